"""`@step`: whatever fails in an asset's body is one line for the user, and leaves no trace of a thing that was made."""

import json
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
from pydantic import Field

from mllm_assets.artifacts import write_manifest
from mllm_assets.components.assets.step import TEMPORARY_HOME, step
from mllm_assets.components.reporting import OFF, link
from mllm_assets.components.resources import ProjectResource
from mllm_assets.definitions import defs
from mllm_assets.errors import DataError

pytestmark = pytest.mark.not_fast

SECRET = "hidden-4Xb7Qz9T"


class Amount(dg.Config):
    number: int = Field(default=1, description="How many.")


def test_every_asset_of_the_graph_is_a_step() -> None:
    """Bodies that translated and recorded by themselves ran domain code outside of their translation."""
    made = [asset for asset in defs().assets or () if isinstance(asset, dg.AssetsDefinition) and asset.is_executable]
    made = [asset for asset in made if not any(OFF in spec.tags for spec in asset.specs)]  # those only say how to begin
    assert len(made) > 10
    bodies = {asset.op.name: asset.op.compute_fn.decorated_fn for asset in made}
    assert [name for name, body in bodies.items() if body.__code__.co_filename != step.__code__.co_filename] == []


def run(
    body: Callable[..., dg.MaterializeResult], project: ProjectResource, **config: int
) -> dg.ExecuteInProcessResult:
    asset = dg.asset(key=["birds", "photos"])(step(body))
    settings = {"ops": {"birds__photos": {"config": config}}} if config else {}
    with dg.instance_for_test() as instance:
        job = dg.Definitions(
            assets=[asset],
            jobs=[dg.define_asset_job("all", op_retry_policy=dg.RetryPolicy(max_retries=2))],
            resources={"project": project},
        ).resolve_job_def("all")
        return job.execute_in_process(run_config=settings, instance=instance, raise_on_error=False)


@pytest.fixture
def project(tmp_path: Path) -> ProjectResource:
    (tmp_path / "store").mkdir()
    return ProjectResource(root=str(tmp_path), store=(tmp_path / "store").as_uri())


def made(project: ProjectResource, **metadata: object) -> dg.MaterializeResult:
    directory = project.layout.root / "photos"
    directory.mkdir()
    write_manifest(directory, {})
    return dg.MaterializeResult(data_version=dg.DataVersion("1"), metadata={"path": "photos", **metadata})


def num_sent(project: ProjectResource) -> int:
    return len([path for path in (project.layout.root / "store").rglob("*") if path.is_file()])


def rows(project: ProjectResource) -> list[dict[str, object]]:
    return project.quality_store.query("select asset, digest, metadata from runs")


def test_what_a_body_returns_is_sent_and_recorded_and_it_sees_its_config(project: ProjectResource) -> None:
    def body(context: dg.AssetExecutionContext, config: Amount, project: ProjectResource) -> dg.MaterializeResult:
        empty = dg.MetadataValue.table([], schema=dg.TableSchema([dg.TableColumn("reason")]))
        return made(project, num_photos=config.number, num_left=0, reasons=empty, notes=[], hub_id="")

    assert (done := run(body, project, number=7)).success
    [event] = [event for event in done.all_events if event.is_step_materialization]
    shown = event.step_materialization_data.materialization.metadata
    assert {"num_photos", "num_left"} <= shown.keys() and not {"reasons", "notes", "hub_id"} & shown.keys()
    [row] = rows(project)
    recorded = json.loads(row.pop("metadata"))
    assert row == {"asset": "birds/photos", "digest": "1"}
    assert {name: recorded[name] for name in ("path", "num_photos")} == {"path": "photos", "num_photos": 7}
    assert recorded["cost_wall_s"] > 0 and recorded["cost_peak_memory_gib"] > 0, "what it took is recorded too"
    assert num_sent(project) > 0


def test_a_folder_that_is_shown_as_a_link_is_sent_too(project: ProjectResource) -> None:
    """With an artefact store sweep, label_issues and what_it_gained did all their work, and ended in an assertion."""

    def body(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        return made(project, path=link("photos"))

    assert run(body, project).success and num_sent(project) > 0


def test_a_run_that_dagster_forgets_says_so_once(project: ProjectResource, capfd: pytest.CaptureFixture[str]) -> None:
    """`dagster asset materialize` without a DAGSTER_HOME made an asset that `mllm-assets run` called "never made"."""

    @step
    def body(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        return dg.MaterializeResult(data_version=dg.DataVersion("1"))

    parts = [dg.asset(key=["pretrained", name])(body) for name in ("one", "two")]
    for home, times in ((TEMPORARY_HOME + "x", 1), ("home", 0)):
        (folder := project.layout.root / home).mkdir()
        with dg.DagsterInstance.local_temp(str(folder)) as instance:
            assert dg.materialize(parts, instance=instance, resources={"project": project}).success
        assert capfd.readouterr().err.count("Dagster forgets this run") == times


def test_an_error_at_the_very_end_of_a_body_is_one_line_and_nothing_is_recorded(project: ProjectResource) -> None:
    def body(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        made(project)
        raise DataError("photo 3 is torn. Delete it.")

    result = run(body, project)
    [failure] = result.get_step_failure_events()
    assert failure.step_failure_data.user_failure_data.description == "photo 3 is torn. Delete it."
    assert not [event for event in result.all_events if event.event_type_value == "STEP_UP_FOR_RETRY"]
    assert not [event for event in result.all_events if event.is_step_materialization]
    assert (rows(project), num_sent(project)) == ([], 0)


def test_a_store_that_refuses_fails_the_step_before_a_row_is_written(project: ProjectResource) -> None:
    def body(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        return made(project)

    store = project.layout.root / "store"
    store.rmdir()
    store.write_text("no folder")
    [failure] = run(body, project).get_step_failure_events()
    assert "store" in failure.step_failure_data.user_failure_data.description
    assert rows(project) == []


def test_a_secret_in_an_error_or_in_metadata_is_not_shown(
    project: ProjectResource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)

    def tells(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        return made(project, note=f"with {SECRET}", page=dg.MetadataValue.md(SECRET))

    def raises(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        raise ValueError(SECRET)

    assert (told := run(tells, project)).success
    assert SECRET not in str(told.all_events) and SECRET not in str(rows(project))
    [failure] = run(raises, project).get_step_failure_events()
    assert SECRET not in str(failure) and "ValueError" in failure.step_failure_data.user_failure_data.description
