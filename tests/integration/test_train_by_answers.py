"""The best model by what it answers: measured while it trains, without a trace in what is trained."""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm_assets.artifacts import read_manifest
from mllm_assets.errors import RecipeError
from mllm_assets.evaluation.metrics import compute_metrics
from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.evaluation.scores import METRICS, Answers, Metric
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.run_settings import AnswerSample
from mllm_assets.worker.tasks import Manifest, TrainTask
from tests.interruption import EXACT_FILES, losses, make_task
from tests.worker_tasks import evaluation

pytestmark = pytest.mark.integration

PROJECTOR = {"finetuning_type": "full", "freeze_language_model": True}


def task_in(folder: Path, parity_dir: Path, **values: Any) -> TrainTask:
    steps = {"max_steps": 8, "eval_steps": 4, "save_steps": 4}
    return make_task(parity_dir, folder / "run", cache_dir=folder.parent / "cache", **{**steps, **values})


def draws(given: Answers) -> float:
    """A metric that draws from every source of random numbers."""
    return random.random() + float(np.random.rand()) + float(torch.rand(())) + METRICS["chrf"].total(given)  # pyright: ignore


@pytest.fixture
def metric(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Metric:
    """One of one's own."""
    made = Metric(name="own", unit="1", definition="own", **request.param)
    monkeypatch.setitem(METRICS, made.name, made)
    return made


@pytest.fixture(scope="module")
def asked(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainTask:
    """A finished run whose best checkpoint is chosen by chrF, from cached features."""
    task = task_in(
        tmp_path_factory.mktemp("asked") / "whole", parity_dir,
        **PROJECTOR, metric_for_best_model="chrf", load_best_model_at_end=True, per_device_train_batch_size=4,
    )  # fmt: skip
    train_task(task, Reporter())
    return task


@pytest.mark.slow
@pytest.mark.parametrize("metric", [{"total": draws}], indirect=True)
def test_asking_changes_no_bit_of_what_is_trained(parity_dir: Path, tmp_path: Path, metric: Metric) -> None:
    """LoRA's dropout and the order of the rows are drawn from the states that asking must leave alone."""
    plain = task_in(tmp_path / "plain", parity_dir)
    own = task_in(tmp_path / "asked", parity_dir, metric_for_best_model=metric.name)
    found = [train_task(task, Reporter()) for task in (plain, own)]
    assert found[0]["weights_digest"] == found[1]["weights_digest"]
    for key in ("loss", "eval_loss"):
        assert losses(plain.run_dir, key) == losses(own.run_dir, key)
    assert sorted(losses(own.run_dir, "eval_own")) == [4, 8] and not losses(plain.run_dir, "eval_own")
    assert found[1]["eval_answers"]["own"] == losses(own.run_dir, "eval_own")[8]


@pytest.mark.slow
def test_what_is_logged_is_what_the_published_model_answers_when_it_is_asked_again(
    asked: TrainTask, parity_dir: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(asked.run_dir)
    logged = losses(asked.run_dir, "eval_chrf")
    best = max(logged, key=lambda step: (logged[step], -step))
    assert (manifest["published_step"], manifest["eval_answers"]["chrf"]) == (best, logged[best])
    assert manifest["caches"]["vision_features"] == "cached"
    again = evaluation(
        model_dir=asked.run_dir / "model", data_dir=parity_dir / "data", directory=tmp_path / "predictions",
        recipe=asked.recipe, features_root=asked.caches.features_root, max_samples=asked.answers.max_samples,
    )  # fmt: skip
    evaluate_task(replace(again, models=("tuned",)), Reporter())
    scored = compute_metrics(read_predictions(tmp_path / "predictions"), ["an answer"])["entries"]["gemma3_vlm_val"]
    assert scored["models"]["tuned"]["chrf"] == pytest.approx(logged[best], abs=1e-9)


def test_a_run_that_goes_on_from_a_checkpoint_ends_as_one_that_was_not_interrupted(
    asked: TrainTask, tmp_path: Path
) -> None:
    """What a kill after step 4 leaves: the log has a later step, nothing is published."""
    run_dir = tmp_path / "run"
    shutil.copytree(asked.run_dir, run_dir)
    for name in ("model", "checkpoint-8"):
        shutil.rmtree(run_dir / name)
    (run_dir / "manifest.json").unlink()
    result = train_task(replace(asked, run_dir=run_dir), Reporter())
    whole = read_manifest(asked.run_dir)
    assert result["resumed_from_step"] == 4
    for key in ("weights_digest", "published_step", "eval_answers"):
        assert result[key] == whole[key]
    for name in EXACT_FILES:
        assert (run_dir / "checkpoint-8" / name).read_bytes() == (asked.run_dir / "checkpoint-8" / name).read_bytes()
    assert losses(run_dir, "eval_chrf") == losses(asked.run_dir, "eval_chrf")


def values_in_turn(*values: float) -> Any:
    """A metric that has these values, whatever is answered; the first is asked for before training."""
    left: Iterator[float] = iter(values)
    return lambda given: next(left)


@pytest.mark.parametrize(
    "metric",
    [
        pytest.param({"total": values_in_turn(0, 0.2, 0.9, 0.5, 0.4)}, id="higher"),
        pytest.param({"total": values_in_turn(0, 0.9, 0.2, 0.5, 0.4), "higher_is_better": False}, id="lower"),
    ],
    indirect=True,
)
def test_early_stopping_and_the_best_checkpoint_know_which_direction_is_better(
    parity_dir: Path, tmp_path: Path, metric: Metric
) -> None:
    task = task_in(
        tmp_path / "own", parity_dir, **PROJECTOR, metric_for_best_model="own", load_best_model_at_end=True,
        eval_steps=1, save_steps=1, early_stopping_steps=2,
    )  # fmt: skip
    result: Manifest = train_task(replace(task, answers=AnswerSample(max_samples=1, max_new_tokens=2)), Reporter())
    assert (result["num_steps"], result["published_step"]) == (4, 2)
    state = json.loads((task.run_dir / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2


def test_a_metric_that_the_rows_cannot_give_is_refused_before_the_first_step(parity_dir: Path, tmp_path: Path) -> None:
    task = task_in(tmp_path / "own", parity_dir, **PROJECTOR, metric_for_best_model="box_iou")
    with pytest.raises(RecipeError, match=r"box_iou cannot be measured on gemma3_vlm_val: .* to another metric"):
        train_task(task, Reporter())
    assert not (task.run_dir / "trainer_log.jsonl").exists()
