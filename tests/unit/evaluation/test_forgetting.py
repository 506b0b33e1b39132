"""What a model forgot is measured on questions of their own, and judged only where a threshold is set."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mllm_assets.artifacts import write_manifest
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import IntegrityError, RecipeError
from mllm_assets.evaluation.forgetting import (
    PLAIN_QUESTIONS,
    UNRELATED_FILE,
    forgetting_markdown,
    measure_forgetting,
    unrelated_entries,
)
from mllm_assets.evaluation.gates import FORGETS, GateSpec, evaluate_gates
from mllm_assets.evaluation.metrics import compute_metrics
from mllm_assets.evaluation.table import to_table
from tests.unit.evaluation.made_predictions import prediction, predictions


def asked(directory: Path, rise_nats: float) -> Path:
    """Predictions about 6 plain questions, of which the tuned model's losses are higher by `rise_nats`, or nearly."""
    rows = [
        prediction(model, index, entry=PLAIN_QUESTIONS, loss_nats=2.0 + 0.1 * index + rise)
        for model, rise in (("base", 0.0), ("tuned", rise_nats))
        for index in range(6)
    ]
    directory.mkdir()
    pq.write_table(to_table(rows), directory / UNRELATED_FILE)
    write_manifest(directory, {})
    return directory


def judged(metrics: dict[str, Any], allowed: float | None) -> dict[str, Any]:
    return {gate.name: gate for gate in evaluate_gates(metrics, GateSpec(max_forgetting_nats=allowed))}


def test_the_rise_over_the_base_model_is_measured_and_judged_where_a_threshold_is_set(tmp_path: Path) -> None:
    metrics = compute_metrics(predictions(), ["cat"]) | {"forgetting": measure_forgetting(asked(tmp_path / "p", 0.5))}
    measured = metrics["forgetting"][PLAIN_QUESTIONS]
    assert measured["num_samples"] == 6 and measured["gains"]["loss"]["mean"] == pytest.approx(-0.5)
    assert "(6) | 2.315 → 2.815 | -0.5 (-0.5 to -0.5)" in forgetting_markdown(metrics["forgetting"])
    assert FORGETS not in judged(metrics, None)
    assert judged(metrics, 0.6)[FORGETS].passed
    gate = judged(metrics, 0.1)[FORGETS]
    assert not gate.passed and gate.observed == pytest.approx(0.5)
    assert gate.description.startswith("plain_questions: the rise in loss over the base model is 0.5000")


def test_a_threshold_without_a_measurement_stops_the_release(tmp_path: Path) -> None:
    write_manifest(tmp_path, {})
    assert measure_forgetting(tmp_path) == {}
    gate = judged(compute_metrics(predictions(), ["cat"]), 0.1)[FORGETS]
    assert not gate.passed and "name entries in evaluation.unrelated" in gate.description


def test_changed_answers_are_not_measured(tmp_path: Path) -> None:
    directory = asked(tmp_path / "p", 0.5)
    pq.write_table(to_table([]), directory / UNRELATED_FILE)
    with pytest.raises(IntegrityError, match=UNRELATED_FILE):
        measure_forgetting(directory)


def test_the_shipped_questions_are_an_entry_of_every_project_and_what_is_trained_on_is_none(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    entry = unrelated_entries(Dataset(tmp_path), [PLAIN_QUESTIONS], ["mine"])[PLAIN_QUESTIONS]
    assert len({row.messages[0].content for row in entry.rows}) == 32
    assert all(not row.images and row.messages[1].content for row in entry.rows)
    with pytest.raises(RecipeError, match="evaluation.unrelated names mine, which the recipe trains on"):
        unrelated_entries(Dataset(tmp_path), ["mine"], ["mine"])
    with pytest.raises(RecipeError, match="plain_question"):
        unrelated_entries(Dataset(tmp_path), ["plain_question"], [])
