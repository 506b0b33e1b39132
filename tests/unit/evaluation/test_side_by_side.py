"""The answers of any two models to the same samples, a page at a time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm_assets.artifacts import write_manifest
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.metrics import write_metrics
from mllm_assets.evaluation.side_by_side import CHANGES, Model, Pairs, pairs_of
from mllm_assets.evaluation.table import PREDICTIONS_FILE
from mllm_assets.layout import Layout
from mllm_assets.training.runs.history import known_runs
from tests.unit.evaluation.made_predictions import predictions


def evaluated(root: Path, name: str, table: pa.Table, metrics: Mapping[str, Any] | None = None) -> None:
    """A finished run and the answers of its model and its base model."""
    run, parent = root / "outputs" / "mine" / name, root / "outputs" / "mine"
    predicted = parent / "predictions" / name
    for folder in (run, predicted):
        folder.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"starts_from": {"recipe": {}}, "overrides": {}}))
    write_manifest(run, {"recipe": {"seed": 1}, "overrides": {}, "weights_digest": name})
    pq.write_table(table, predicted / PREDICTIONS_FILE)
    write_manifest(predicted, {"digest": name})
    inputs = {"weights_digest": name, "predictions_path": str(predicted.relative_to(root))}
    write_metrics(parent / "eval_metrics" / name, dict(metrics or {}), inputs)


def pairs(root: Path, first: tuple[str, Model], second: tuple[str, Model]) -> Pairs:
    runs = {run.directory.name: run for run in known_runs(Layout(root))}
    return pairs_of(Layout(root), (runs[first[0]], first[1]), (runs[second[0]], second[1]))


def ids(found: Pairs, change: str = "", order: str = "as in the entry") -> str:
    return " ".join(pair.sample_id.removeprefix("sample-") for pair in found.at(found.found(change, order)))


def test_samples_are_chosen_by_who_is_right_and_ordered_by_how_much_better_one_is(tmp_path: Path) -> None:
    """The base is right about sample 1 only, the tuned model about all but 5."""
    evaluated(tmp_path, "aaaa", predictions())
    found = pairs(tmp_path, ("aaaa", "base"), ("aaaa", "tuned"))
    assert (len(found), found.num_right) == (6, (1, 5))
    kinds = {change: ids(found, change) for change in CHANGES}
    assert kinds == {"": "0 1 2 3 4 5", "differ": "0 2 3 4 5", "fixed": "0 2 3 4", "broken": "", "wrong": "5"}
    assert ids(found, order="hardest first") == "5 4 3 2 1 0"
    [first] = found.at([0])
    assert (first.answers, first.rights, first.losses_nats) == (("zebra", "cat"), (False, True), (3.0, 1.0))
    assert first.images == [tmp_path / "data" / "images" / "0.png"]


def test_two_runs_are_compared_on_what_both_were_asked_in_whatever_order(tmp_path: Path) -> None:
    table = predictions()
    evaluated(tmp_path, "aaaa", table)
    evaluated(tmp_path, "bbbb", table.take(list(reversed(range(2, 12)))))  # the base was asked four of them
    found = pairs(tmp_path, ("aaaa", "tuned"), ("bbbb", "base"))
    assert ids(found) == "2 3 4 5"
    assert [pair.answers for pair in found.at([0, 3])] == [("dog", "zebra"), ("cow", "zebra")]


def test_answers_without_labels_are_right_or_unknown(tmp_path: Path) -> None:
    evaluated(tmp_path, "aaaa", predictions(label=None))
    found = pairs(tmp_path, ("aaaa", "base"), ("aaaa", "tuned"))
    assert found.num_right == (1, 5) and ids(found, "wrong") == ids(found, "fixed") == ""
    assert found.at([5])[0].rights == (None, None)


def test_models_that_were_asked_nothing_in_common_are_not_compared(tmp_path: Path) -> None:
    others: dict[str, Any] = {"entry": "other_val"}
    evaluated(tmp_path, "aaaa", predictions())
    evaluated(tmp_path, "bbbb", predictions(**others))
    with pytest.raises(IntegrityError, match="were asked nothing in common"):
        pairs(tmp_path, ("aaaa", "tuned"), ("bbbb", "tuned"))
