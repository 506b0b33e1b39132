"""What a weekly tick says of each line of recipes."""

import logging

import dagster as dg
import pytest

from mllm_assets.components.automation.retraining import retraining_job, weekly_retraining

LINES = {"mine": ["mine"], "other": ["other"], "third": ["third"]}


def repository(code_version: str) -> dg.RepositoryDefinition:
    @dg.multi_asset(specs=[dg.AssetSpec([name, "checkpoint"], code_version=code_version) for name in LINES])
    def made():
        yield dg.MaterializeResult(asset_key=["mine", "checkpoint"])

    job = retraining_job(LINES, None)
    schedule = weekly_retraining(LINES, job, "0 3 * * 1", enabled=True)
    return dg.Definitions(assets=[made], jobs=[job], schedules=[schedule]).get_repository_def()


def made(instance: dg.DagsterInstance, recipe: str, code_version: str) -> None:
    tags = {"dagster/code_version": code_version}
    instance.report_runless_asset_event(dg.AssetMaterialization([recipe, "checkpoint"], tags=tags))


def test_a_tick_that_launches_one_line_logs_why_it_does_not_launch_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Dagster shows a skip reason only where nothing is launched: the others' reasons were nowhere."""
    shown = repository("2")
    with dg.instance_for_test() as instance, caplog.at_level(logging.INFO):
        made(instance, "mine", "1")
        made(instance, "other", "2")
        schedule = shown.get_schedule_def("weekly_retraining")
        with dg.build_schedule_context(instance=instance, repository_def=shown) as context:
            context.log.addHandler(caplog.handler)
            data = schedule.evaluate_tick(context)
    assert [request.tags["mllm_assets/retraining"] for request in data.run_requests or []] == ["mine"]
    assert data.skip_message is None
    said = [record.getMessage().split(" - ")[-1] for record in caplog.records]
    assert "other: nothing changed" in said
    assert "third: never trained, so there is nothing to retrain" in said
