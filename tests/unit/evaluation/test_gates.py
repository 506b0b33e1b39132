"""Gates before a release."""

import random
from typing import Any

import pytest

from mllm_assets.errors import RecipeError
from mllm_assets.evaluation.gates import GateResult, GateSpec, evaluate_gates, failed
from mllm_assets.evaluation.metrics import compute_metrics, gains_over_release
from mllm_assets.evaluation.table import to_table
from tests.unit.evaluation.made_predictions import prediction, predictions

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
        "pets_val: the gain in label_accuracy over always answering 'cat' is 0.0000 (95 % interval 0.0000 to 0.0000, "
        "6 samples); more than 0 is needed of the interval's lower end."
    )


def test_a_model_blind_to_the_image_does_not_pass() -> None:
    rows = [prediction(m, i) for m in ("base", "tuned") for i in range(6)]
    blind = compute_metrics(to_table([row | {"loss_shuffled_nats": row["loss_nats"]} for row in rows]), TRAIN)
    assert [r.name for r in failed(evaluate_gates(blind, GateSpec()))] == ["the_model_uses_the_image"]


def test_a_gain_within_its_noise_does_not_pass() -> None:
    """One lucky sample of six is not evidence."""
    rows = [prediction("base", i, loss_nats=1.0) for i in range(6)]
    rows += [prediction("tuned", i, loss_nats=0.7 if i == 0 else 1.0) for i in range(6)]
    gate = evaluate_gates(compute_metrics(to_table(rows), TRAIN), GateSpec())[0]
    assert not gate.passed and "is 0.0500 (95 % interval 0.0000 to" in gate.description
    assert (gate.observed, gate.low) == (pytest.approx(0.05), 0) and gate.high is not None and gate.high > 0.05
    assert gate.description.endswith("more samples to judge by make the interval narrower.")


def test_the_luckiest_of_many_trials_on_val_is_refused_on_test() -> None:
    """Where answers are shuffled there is nothing to learn, but one of 200 trials looks as if it had learnt on val."""
    draw, names = random.Random(0), ("cat", "dog")
    truth = {split: [draw.choice(names) for _ in range(60)] for split in ("val", "test")}
    guesses = [{split: [draw.choice(names) for _ in range(60)] for split in truth} for _ in range(200)]
    winner = max(guesses, key=lambda one: sum(map(str.__eq__, one["val"], truth["val"])))

    def gates(split: str) -> dict[str, GateResult]:
        rows = []
        for model, answers in (("base", ["cat"] * 60), ("tuned", winner[split])):
            for row, (answer, right) in enumerate(zip(answers, truth[split], strict=True)):
                shown = {"row_index": row, "sample_id": f"sample-{row}", "images": [f"images/{row}.png"]}
                rows.append(prediction(model, 0, **shown, answer=answer, reference=right, label=right))
        return {one.name: one for one in evaluate_gates(compute_metrics(to_table(rows), ["cat"]), GateSpec())}

    assert gates("val")["beats_most_common_answer"].passed
    assert not gates("test")["beats_most_common_answer"].passed


def test_preferences_are_judged_by_answers_whatever_their_loss() -> None:
    """A model whose answers became right did not pass: its loss rose with that of the rejected ones."""
    rows = [prediction("base", i, answer="cow", loss_nats=1.0) for i in range(6)]
    rows += [prediction("tuned", i, loss_nats=1.5) for i in range(6)]
    metrics = compute_metrics(to_table(rows), TRAIN)
    by_loss, by_answers = (evaluate_gates(metrics, GateSpec(beats_base_by=by))[0] for by in ("loss", "answers"))
    assert (by_loss.passed, by_loss.observed) == (False, pytest.approx(-0.5))
    assert (by_answers.passed, by_answers.observed) == (True, pytest.approx(5 / 6))
    assert by_answers.description.startswith("pets_val: the gain in label_accuracy over the base model is 0.8333")
    worse = compute_metrics(to_table([row | {"answer": "cow"} for row in rows]), TRAIN)
    assert not evaluate_gates(worse, GateSpec(beats_base_by="answers"))[0].passed


def test_the_dust_of_another_order_of_sums_is_no_gain() -> None:
    """An untrained model beat its base model by 1e-8 on every sample, with a narrow interval."""
    rows = [prediction("base", i, loss_nats=1.0 + i) for i in range(6)]
    rows += [prediction("tuned", i, loss_nats=1.0 + i - 1e-8) for i in range(6)]
    gate = evaluate_gates(compute_metrics(to_table(rows), TRAIN), GateSpec())[0]
    assert not gate.passed and gate.low is not None and gate.low > 0


def test_the_worst_of_several_entries_counts() -> None:
    rows = [prediction(m, i) for m in ("base", "tuned") for i in range(6)]
    worse = [row | {"entry": "zoo_val", "answer": "cat"} for row in rows]
    gate = evaluate_gates(compute_metrics(to_table(rows + worse), TRAIN), GateSpec())[1]
    assert not gate.passed and gate.description.startswith("zoo_val: ")


def test_what_was_not_measured_does_not_pass() -> None:
    gate = evaluate_gates(metrics_of(loss_shuffled_nats=None), GateSpec())[2]
    assert not gate.passed
    assert gate.description == "pets_val: loss was not measured on at least 2 samples, too few to judge."


def over_release(*rises: float) -> dict[str, Any]:
    """Gains of a model whose losses are above the release's by so much, sample by sample."""
    then = [prediction("tuned", i) for i in range(len(rises))]
    now = [row | {"loss_nats": row["loss_nats"] + rise} for row, rise in zip(then, rises, strict=True)]
    return gains_over_release(to_table(now), to_table(then))


def regression_gate(spec: GateSpec, *rises: float) -> GateResult:
    return evaluate_gates(metrics_of(), spec, over_release(*rises))[-1]


def test_a_worse_loss_than_the_release_does_not_pass() -> None:
    gate = regression_gate(GateSpec(), 0.4, 0.5, 0.6, 0.5)
    assert (gate.name, gate.passed) == ("no_regression_against_release", False)
    assert "the rise in loss over the release is 0.5000 (95 % interval 0.4" in gate.description
    assert gate.low is not None and gate.low > 0.01 and gate.observed == pytest.approx(0.5)
    assert regression_gate(GateSpec(max_regression_nats=0.6), 0.4, 0.5, 0.6, 0.5).passed
    assert regression_gate(GateSpec(), 0.0, 0.0, 0.0, 0.0).passed


def test_a_rise_within_its_noise_is_no_regression() -> None:
    """Its mean alone would have failed."""
    gate = regression_gate(GateSpec(), 0.5, -0.4, 0.3, -0.2, 0.1, -0.1)
    assert gate.passed and over_release(0.5, -0.4, 0.3, -0.2, 0.1, -0.1)["pets_val"]["loss"]["mean"] < -0.01


def test_losses_on_other_samples_are_not_compared() -> None:
    gains = gains_over_release(predictions(), predictions(reference="x"))
    gate = evaluate_gates(metrics_of(), GateSpec(), gains)[-1]
    assert gate.passed and "cannot be compared" in gate.description


def test_thresholds_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RecipeError, match="max_regression_nats is -1: expected 0 or more. To allow any regression"):
        GateSpec(max_regression_nats=-1)
