"""A recipe whose settings ask for a person: its line stops before the release, and goes on with the person's yes."""

import shutil
from pathlib import Path

import dagster as dg
import pytest

from mllm_assets.cli import main
from mllm_assets.components.automation.approvals import approved_release
from mllm_assets.evaluation.gates import APPROVAL
from mllm_assets.releases.approvals import read_decisions
from tests.integration.conftest import EVERYTHING_PASSES, Project

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]
RELEASE = dg.AssetKey(["mine", "released_model"])


@pytest.fixture
def waiting(released: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Evaluated with gates that pass, and not released."""
    shutil.rmtree(released.layout.releases("mine"))
    released.set_defaults(gates={**EVERYTHING_PASSES, "approval": "required"})
    for name, value in (("DAGSTER_HOME", released.home), ("MLLM_ASSETS_ROOT", released.root)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(released.root)
    return released


def run(project: Project, *names: str) -> tuple[int, str]:
    """Make these assets alone, in a process of their own: this one keeps no project's definitions."""
    process = project.start("mllm_assets.cli", "run", *names, "--only")
    output, _ = process.communicate(timeout=500)
    return process.returncode, output


def check(instance: dg.DagsterInstance) -> tuple[bool, str]:
    key = dg.AssetCheckKey(dg.AssetKey(["mine", "eval_metrics"]), APPROVAL)
    [record] = instance.event_log_storage.get_asset_check_execution_history(key, 1)
    assert record.event and record.event.dagster_event
    evaluated = record.event.dagster_event.asset_check_evaluation_data
    return evaluated.passed, evaluated.description or ""


def tick(project: Project, instance: dg.DagsterInstance) -> "dg.SensorExecutionData":  # pyright: ignore
    sensor = approved_release({"mine": [RELEASE]}, project.layout)
    return sensor.evaluate_tick(dg.build_sensor_context(instance))


@pytest.mark.slow
def test_a_line_stops_before_the_release_until_somebody_says_yes(
    waiting: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = run(waiting, "mine/eval_metrics", "mine/released_model")
    assert code == 1 and f"{APPROVAL}: It waits for a person's yes" in output
    assert not waiting.layout.releases("mine").exists()
    with dg.DagsterInstance.from_config(str(waiting.home)) as instance:
        assert tick(waiting, instance).skip_message == f"mine: {APPROVAL} waits: mllm-assets approve mine"

        assert main(["approve", "mine", "--refuse", "--who", "Grace", "--why", "too few samples", "--yes"]) == 0
        assert check(instance)[0] is False and "refused by Grace" in check(instance)[1]
        assert "mine: it was refused by Grace on " in (tick(waiting, instance).skip_message or "")

        assert main(["approve", "mine", "--who", "Ada", "--yes"]) == 0
        shown = capsys.readouterr().out
        assert "beats_base_model: passed" in shown and "loss" in shown and "gallery.html" in shown
        assert "refused by Grace on " in shown and "mine: approved by Ada on " in shown
        assert check(instance)[0] is True
        [request] = tick(waiting, instance).run_requests or []
        assert request.asset_selection == [RELEASE] and request.tags["mllm_assets/reason"] == "approved by Ada"

        code, output = run(waiting, "mine/released_model")
        assert code == 0, output
        assert tick(waiting, instance).skip_message == "mine: its last evaluated model is released, as v1"
    card = (waiting.layout.releases("mine") / "v1" / "README.md").read_text()
    assert "Grace | refused" in card and "Ada | approved" in card
    seen = read_decisions(waiting.layout, "mine")[-1].seen
    assert seen["gate beats_base_model"].startswith("passed") and "->" in seen["emoji_test loss"]


def test_nothing_is_decided_without_being_asked(
    waiting: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["approve", "mine"]) == 2
    assert "There is no terminal to ask on. Give --yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "")
    assert main(["approve", "mine"]) == 1
    assert main(["approve", "mini"]) == 2 and "Did you mean 'mine'?" in capsys.readouterr().err
    assert main(["approve", "mine", "--refuse", "--yes"]) == 2 and "--why TEXT" in capsys.readouterr().err
    assert not Path(waiting.layout.releases("mine")).exists()
