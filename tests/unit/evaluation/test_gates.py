"""Gates before a release."""

import copy
from typing import Any

import pytest
from made_predictions import prediction, predictions

from mllm_assets.errors import RecipeError
from mllm_assets.evaluation.gates import GateSpec, evaluate_gates, failed
from mllm_assets.evaluation.metrics import compute_metrics
from mllm_assets.evaluation.table import to_table

TRAIN = ["cat", "cat", "dog"]


def metrics_of(**changes: Any) -> dict[str, Any]:
    return compute_metrics(predictions(**changes), TRAIN)


def test_a_model_that_learned_passes_all_gates() -> None:
    results = evaluate_gates(metrics_of(), GateSpec())
    assert [(r.name, r.passed) for r in results] == [
        ("beats_base_model", True),
        ("beats_most_common_answer", True),
        ("the_model_uses_the_image", True),
    ]


def test_always_giving_the_most_common_answer_does_not_pass() -> None:
    results = {r.name: r for r in evaluate_gates(metrics_of(answer="cat"), GateSpec())}
    gate = results["beats_most_common_answer"]
    assert not gate.passed
    assert gate.description == (
        "pets_val: the gain in label_accuracy over always answering 'cat' is 0.0000; more than 0.0000 is needed "
        "(0 plus 1.645 standard errors of 6 samples)."
    )


def test_a_model_blind_to_the_image_does_not_pass() -> None:
    rows = [prediction(m, i) for m in ("base", "tuned") for i in range(6)]
    blind = compute_metrics(to_table([row | {"loss_shuffled_nats": row["loss_nats"]} for row in rows]), TRAIN)
    assert [r.name for r in failed(evaluate_gates(blind, GateSpec()))] == ["the_model_uses_the_image"]


def test_a_gain_within_its_noise_does_not_pass() -> None:
    """One lucky sample of six is no evidence."""
    rows = [prediction("base", i, loss_nats=1.0) for i in range(6)]
    rows += [prediction("tuned", i, loss_nats=0.7 if i == 0 else 1.0) for i in range(6)]
    metrics = compute_metrics(to_table(rows), TRAIN)
    assert not evaluate_gates(metrics, GateSpec())[0].passed
    assert evaluate_gates(metrics, GateSpec(num_stderr=0))[0].passed


def test_the_worst_of_several_entries_counts() -> None:
    rows = [prediction(m, i) for m in ("base", "tuned") for i in range(6)]
    worse = [row | {"entry": "zoo_val", "answer": "cat"} for row in rows]
    gate = evaluate_gates(compute_metrics(to_table(rows + worse), TRAIN), GateSpec())[1]
    assert not gate.passed and gate.description.startswith("zoo_val: ")


def test_what_was_not_measured_does_not_pass() -> None:
    gate = evaluate_gates(metrics_of(loss_shuffled_nats=None), GateSpec())[2]
    assert not gate.passed
    assert gate.description == "pets_val: loss was not measured on at least 2 samples, so nothing can be said."


def test_a_worse_loss_than_the_release_does_not_pass() -> None:
    metrics = metrics_of()
    better = copy.deepcopy(metrics)
    better["entries"]["pets_val"]["models"]["tuned"]["loss"] -= 0.5
    gate = evaluate_gates(metrics, GateSpec(), released=better)[-1]
    assert (gate.name, gate.passed) == ("no_regression_against_release", False)
    assert gate.observed == pytest.approx(0.5)
    assert evaluate_gates(metrics, GateSpec(max_regression_nats=0.6), released=better)[-1].passed
    assert evaluate_gates(metrics, GateSpec(), released=metrics)[-1].passed


def test_losses_on_other_samples_are_not_compared() -> None:
    other = compute_metrics(predictions(reference="x"), TRAIN)
    gate = evaluate_gates(metrics_of(), GateSpec(), released=other)[-1]
    assert gate.passed and "cannot be compared" in gate.description


def test_thresholds_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RecipeError, match="num_stderr and max_regression_nats must be 0 or more, got -1 and 0.01"):
        GateSpec(num_stderr=-1)
