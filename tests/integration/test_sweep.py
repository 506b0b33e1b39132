"""`<recipe>/sweep`: trials are ordinary runs that share caches; what was killed goes on; the winner is a recipe."""

import json
import random
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from PIL import Image

from mllm_assets.artifacts import point_symlink
from mllm_assets.components.slots import end_dead_runs
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.evaluation.gates import GateSpec, evaluate_gates, failed
from mllm_assets.evaluation.metrics import compute_metrics
from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.recipe.load import load_recipe
from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.runs.plan import RunPlan, plan_run
from mllm_assets.training.runs.sweep import best_of, run_sweep
from mllm_assets.training.runs.sweep_spec import SweepSpec
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.run_settings import AnswerSample, RunSettings
from mllm_assets.worker.tasks import Manifest
from tests.integration.conftest import Project, processes_of, wait_for
from tests.worker_tasks import ONE_CPU_THREAD, evaluation

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


def write_shuffled(folder: Path) -> None:
    """Pictures of one colour each whose names say nothing of them: three of four are called cat."""
    draw, entries = random.Random(0), {}
    (folder / "data" / "images").mkdir(parents=True)
    for split, count in (("train", 32), ("val", 16), ("test", 64)):
        rows = []
        for number in range(count):
            name, label = f"images/{split}_{number}.png", draw.choice(("cat", "cat", "cat", "dog"))
            Image.new("RGB", (32, 32), tuple(draw.randrange(256) for _ in range(3))).save(folder / "data" / name)
            said = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": label}]
            rows.append({"messages": said, "images": [name], "label": label})
        (folder / "data" / f"{split}.json").write_text(json.dumps(rows))
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        columns = {"messages": "messages", "images": "images"}
        entries[f"a_{split}"] = {
            "file_name": f"{split}.json", "formatting": "sharegpt", "columns": columns, "tags": tags,
        }  # fmt: skip
    (folder / "data" / "dataset_info.json").write_text(json.dumps(entries))


def test_on_shuffled_answers_the_best_trial_looks_good_on_val_and_its_gate_on_test_refuses_it(
    parity_dir: Path, tmp_path: Path
) -> None:
    write_shuffled(tmp_path)
    point_symlink(tmp_path / "model", parity_dir / "model")
    recipe = {
        "model_name_or_path": "model", "dataset": "a_train", "eval_dataset": "a_val", "template": "gemma3",
        "do_train": True, "finetuning_type": "full", "learning_rate": 3e-3, "per_device_train_batch_size": 8,
        "max_steps": 16, "logging_steps": 8, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 8,
    }  # fmt: skip
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    spec = SweepSpec(parameters={"seed": [1, 2, 3]}, objective="label_accuracy")
    asked = AnswerSample(metrics=spec.asked, max_new_tokens=4)

    def plan(values: Mapping[str, Any]) -> RunPlan:
        return plan_run(load_recipe(path, values), root=tmp_path, settings=RunSettings(answers=asked))

    def train(planned: RunPlan, _: Any) -> Manifest:
        return train_task(replace(planned.task, accelerator=ONE_CPU_THREAD), Reporter())

    trials = run_sweep(spec, "s", tmp_path / "s.sqlite3", plan=plan, train=train, notify=print)
    best = best_of(trials, spec)
    assert best is not None and best.scores["eval_label_accuracy"] > 0.5, trials

    winner = plan(best.values).directory / "model"
    judged = evaluation(
        model_dir=winner, base_model_dir=tmp_path / "model", data_dir=tmp_path / "data", directory=tmp_path / "found",
        entries=("a_test",), max_new_tokens=4,
    )  # fmt: skip
    evaluate_task(judged, Reporter())
    answers = Dataset(tmp_path / "data").entry("a_train").answers
    metrics = compute_metrics(read_predictions(tmp_path / "found"), list(answers))
    assert "beats_most_common_answer" in [gate.name for gate in failed(evaluate_gates(metrics, GateSpec()))]
