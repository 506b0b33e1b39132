"""`<recipe>/sweep`: trials are ordinary runs that share caches; what was killed goes on; the winner is a recipe."""

import json
import signal
from typing import Any

import dagster as dg
import pytest

from mllm_assets.components.slots import end_dead_runs
from mllm_assets.recipe.load import load_recipe
from tests.integration.conftest import Project, processes_of, wait_for

pytest.importorskip("optuna")
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]
SELECT = 'key:"tried/vision_features" or key:"tried/sweep"'
SWEEP = {
    "parameters": {"learning_rate": {"low": 1e-6, "high": 3e-3, "log": True}, "warmup_ratio": [0.0, 0.2]},
    "num_trials": 6,
    "seed": 3,
}


def prepare(project: Project, **sweep: Any) -> None:
    project.write_recipe(
        "tried", freeze_vision_tower=True, max_steps=8, max_samples=32, save_steps=4, eval_strategy="steps",
        eval_steps=2, per_device_eval_batch_size=16,
    )  # fmt: skip
    project.set_defaults(gates={}, sweep={**SWEEP, **sweep})


def trials_of(project: Project) -> list[dict[str, Any]]:
    [path] = project.layout.outputs.glob("tried/sweep/*/trials.json")
    return json.loads(path.read_text())


def test_the_same_trials_come_out_after_a_kill_and_the_best_is_a_recipe(project: Project) -> None:
    prepare(project)
    output = project.made(SELECT)
    whole = trials_of(project)
    assert [trial["number"] for trial in whole] == [1, 2, 3, 4, 5, 6]
    pruned = [trial for trial in whole if trial["state"] == "pruned"]
    assert pruned and all("is above the median" in trial["why"] and trial["step"] < 8 for trial in pruned), whole
    assert "trial 6 of 6" in output
    metadata = project.metadata("tried", "sweep")
    best = min((trial for trial in whole if trial["scores"]), key=lambda trial: trial["scores"]["eval_loss"])
    assert metadata["eval_loss"] == pytest.approx(best["scores"]["eval_loss"], rel=1e-4)
    assert metadata["num_pruned"] == len(pruned)
    assert len(list(project.layout.features.glob("*"))) == 1, "one tower, one set of pictures: computed once"
    [winner] = project.layout.outputs.glob("tried/sweep/*/tried_swept.yaml")
    assert load_recipe(winner).spec.learning_rate == best["values"]["learning_rate"]

    for path in project.layout.outputs.glob("tried/*/"):  # as if nothing had been made
        path.rename(path.with_name(f"old_{path.name}")) if path.name != "sweep" else path.rename(project.root / "first")
    project.layout.sweeps_db.unlink()
    command = project.materialize('key:"tried/sweep"')
    logs = project.layout.outputs / "tried"
    wait_for(lambda: len(list(logs.glob("[!o]*/trainer_log.jsonl"))) == 3, "the third trial")
    command.send_signal(signal.SIGKILL)
    command.wait()
    wait_for(lambda: not processes_of(project.root), "all processes to end")
    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        end_dead_runs(instance)
    project.made('key:"tried/sweep"')
    assert trials_of(project) == whole
    runs = [path for path in logs.glob("[!o]*/") if path.name not in ("sweep", "latest")]
    assert sorted(path.name for path in runs) == sorted(trial["run"] for trial in whole), "none was trained twice"
