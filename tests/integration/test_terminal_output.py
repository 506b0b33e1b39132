"""What `dg launch` prints for a person, and what the event log keeps all the same."""

from pathlib import Path

import dagster as dg
import pytest

from mllm_assets.components.assets.step import step
from mllm_assets.components.resources import ProjectResource
from tests.integration.conftest import Project

pytestmark = pytest.mark.integration


@pytest.mark.slow
def test_a_launch_prints_a_line_an_asset_and_the_event_log_stays_whole(project: Project) -> None:
    """Forty lines of DEBUG for one asset hid the two that a person looks for."""
    process = project.start("dagster_dg_cli.cli", "launch", "--assets", 'key:"emoji/raw"')
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert "DEBUG" not in output and "Warning" not in output
    [line] = output.splitlines()
    assert "made emoji/raw: num_samples 800, path data/.raw/emoji/" in line

    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        [run] = instance.get_runs(limit=1)
        events = {entry.dagster_event_type for entry in instance.all_logs(run.run_id)}
    kept = dg.DagsterEventType
    assert {kept.STEP_START, kept.ASSET_MATERIALIZATION, kept.STEP_SUCCESS, kept.RUN_SUCCESS} <= events


def test_a_failed_check_says_its_figures_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Dagster's own error names the checks only, and their figures were in the UI alone."""

    @dg.asset(check_specs=[dg.AssetCheckSpec("is_sharp", asset="photos")])
    @step
    def photos(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        check = dg.AssetCheckResult(check_name="is_sharp", passed=False, description="3 of 4 are blurred")
        return dg.MaterializeResult(metadata={"num_samples": 4}, check_results=[check])

    no_capture = {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}
    with dg.instance_for_test(overrides={"compute_logs": no_capture}) as instance:
        done = dg.materialize([photos], instance=instance, resources={"project": ProjectResource(root=str(tmp_path))})
        said = [entry.user_message for entry in instance.all_logs(done.run_id)]
    assert "made photos: num_samples 4" in said
    assert "check failed: is_sharp: 3 of 4 are blurred" in capfd.readouterr().err
