"""Pairs of references and the model's own wrong answers."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mllm_assets.artifacts import read_manifest, write_manifest
from mllm_assets.data.curate.register import build_entry
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import DataError
from mllm_assets.evaluation.own_mistakes import Mistakes, first_pairs, publish_mistakes
from mllm_assets.evaluation.table import PREDICTIONS_FILE, SCHEMA, to_table
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import png

ANSWERS = [
    ("a red square", "a blue square", 3),
    ("a red circle", "a red circle", 3),
    ("a green star", " ", 1),
    ("a green moon", "a green moon that never", 8),
    ("a heart", "<image>", 2),
]


def published(tmp_path: Path, answers: list[tuple[str, str, int]]) -> Mistakes:
    layout, rows, said = Layout(tmp_path), [], []
    layout.images.mkdir(parents=True)
    for number, (reference, answer, num_tokens) in enumerate(answers):
        (layout.images / f"{number}.png").write_bytes(png(number))
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image>What is it?"},
            {"role": "assistant", "content": reference},
        ]
        rows.append({"id": f"s{number}", "messages": messages, "images": [f"images/{number}.png"]})
        said.append(
            dict.fromkeys(SCHEMA.names)
            | {"model": "tuned", "entry": "shapes", "sample_id": f"s{number}", "row_index": number, "images": []}
            | {"reference": reference, "answer": answer, "num_answer_tokens": num_tokens}
        )
    (layout.data / "shapes.json").write_text(json.dumps(rows))
    layout.dataset_info.write_text(json.dumps({"shapes": build_entry("shapes.json")}))
    folder = tmp_path / "answers"
    folder.mkdir()
    pq.write_table(to_table(said), folder / PREDICTIONS_FILE)
    write_manifest(folder, {})
    return publish_mistakes(
        layout, "first", Dataset(layout.data), folder, max_new_tokens=8, lineage={"weights_digest": "0a"}
    )


def test_a_wrong_answer_and_its_reference_are_a_pair_that_a_recipe_can_name(tmp_path: Path) -> None:
    made = published(tmp_path, ANSWERS)
    reasons = {"right": 1, "empty": 1, "cut": 1, "names a picture": 1}
    assert (made.num_asked, made.num_pairs, made.left_out) == (5, 1, reasons)
    assert first_pairs(made.directory) == [("s0", "a red square", "a blue square")]

    entry = Dataset(tmp_path / "data").entry("first_preferences")
    [row] = entry.read()
    assert entry.info.ranking and row.rejected is not None
    assert [m.content for m in row.messages] == ["Be brief.", "<image>What is it?", "a red square"]
    assert row.rejected.content == "a blue square" and [path.name for path in row.images] == ["0.png"]
    known = read_manifest(made.directory)
    assert (known["weights_digest"], known["recipe"], known["num_pairs"]) == ("0a", "first", 1)


def test_a_model_without_mistakes_makes_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"first: of 1 answers .* none makes a pair \(1 right\), so there is nothing"):
        published(tmp_path, ANSWERS[1:2])
