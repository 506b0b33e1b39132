"""Two models of one recipe, with and without corrections, are compared on the same samples."""

from pathlib import Path

import pytest

from mllm_assets.artifacts import is_sound
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.table import to_table
from mllm_assets.evaluation.what_it_gained import compare_corrected, publish_gained
from mllm_assets.layout import Layout
from tests.unit.evaluation.made_predictions import predictions


def without(num_wrong: int) -> list[dict[str, object]]:
    """The tuned model's rows, of which the first are answered wrongly."""
    rows = [row for row in predictions().to_pylist() if row["model"] == "tuned"]
    return [{**row, "answer": "a stone"} if place < num_wrong else row for place, row in enumerate(rows)]


def test_a_gain_is_positive_where_corrections_made_it_better_and_has_its_interval() -> None:
    [scored] = compare_corrected(predictions(), to_table(without(3))).values()
    accuracy = scored["metrics"]["label_accuracy"]
    assert scored["num_samples"] == accuracy["gain"]["num_pairs"] == 6
    assert accuracy["with"] - accuracy["without"] == pytest.approx(accuracy["gain"]["mean"])
    assert accuracy["gain"]["low"] <= accuracy["gain"]["mean"] <= accuracy["gain"]["high"]
    assert accuracy["gain"]["mean"] > 0 and scored["metrics"]["loss"]["gain"]["mean"] == 0


def test_models_that_were_asked_other_questions_are_not_compared() -> None:
    other = [{**row, "prompt": "What else?"} for row in without(0)]
    with pytest.raises(IntegrityError, match="nothing in common"):
        compare_corrected(predictions(), to_table(other))


def test_what_was_found_is_kept_by_what_it_was_found_from(tmp_path: Path) -> None:
    layout, tables = Layout(tmp_path), (predictions(), to_table(without(2)))
    made = publish_gained(layout, "mine", *tables, {"run_without": "a" * 16})
    assert is_sound(made.directory) and "+0.3333" in made.markdown()
    assert publish_gained(layout, "mine", *tables, {"run_without": "a" * 16}) == made
    assert publish_gained(layout, "mine", *tables, {"run_without": "b" * 16}).directory != made.directory
