"""Splits that a source has itself, in names of files or in a column."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mllm_assets.data.curate.layouts import _side_folders, _sides
from mllm_assets.data.ingest.sides import side_word, side_words
from mllm_assets.data.ingest.sources import read_source
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.errors import DataError, RecipeError


def write(folder: Path, **files: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"image": "a.png", **row}) for row in rows))
    Image.new("RGB", (8, 8)).save(folder / "a.png")


def read(root: Path, **source: object) -> list[tuple[int, str | None, str | None]]:
    spec = SourceSpec(**{"kind": "table", "path": "data/*.jsonl", **source})  # pyright: ignore[reportArgumentType]
    return [(row.row_index, row.source_split, row.caption or row.defect) for row in read_source(spec, root)]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("train-00000-of-00003.parquet", "train"),
        ("captions_val2017.json", "val"),
        ("data/test/part1.csv", "test"),
        ("train/validation.jsonl", "validation"),
        ("train_and_test.csv", None),
        ("latest.json", None),
        ("contest/rows.json", None),
    ],
)
def test_a_file_says_its_split_by_a_whole_word(name: str, word: str | None) -> None:
    assert side_word(Path("/d", name), Path("/d")) == word


def test_files_are_sorted_by_their_names_only_where_all_are_named_so() -> None:
    def words(*names: str) -> dict[str, str]:
        return side_words([Path("/d", name) for name in names], Path("/d"))

    assert words("train-0.jsonl", "train-1.jsonl", "dev.jsonl") == {"train": "train", "val": "dev"}
    assert words("train.jsonl", "extra.jsonl") == {}
    assert words("train-0.jsonl", "train-1.jsonl") == {}


def test_each_file_goes_to_the_side_that_its_name_says(tmp_path: Path) -> None:
    write(
        tmp_path / "data", test_0=[{"text": "c"}], train_0=[{"text": "a"}], train_1=[{"text": "b"}], dev=[{"text": "d"}]
    )
    found = read(tmp_path, split="train", val_split="dev", test_split="test")
    assert found == [(0, "train", "a"), (1, "train", "b"), (2, "val", "d"), (3, "test", "c")]


def test_a_pattern_that_mixes_splits_is_refused_with_what_to_write(tmp_path: Path) -> None:
    write(tmp_path / "data", train=[{"text": "a"}], test=[{"text": "b"}])
    with pytest.raises(DataError, match=r"several splits .* `split: train, val_split: test`"):
        read(tmp_path)
    assert read(tmp_path, path="data/train.jsonl") == [(0, None, "a")]


def test_a_file_of_no_split_and_a_split_without_files_are_errors(tmp_path: Path) -> None:
    write(tmp_path / "data", train=[{"text": "a"}], extra=[{"text": "b"}], val=[{"text": "b"}])
    with pytest.raises(DataError, match=r"extra.jsonl is of none of the splits train, val"):
        read(tmp_path, val_split="val")
    (tmp_path / "data/extra.jsonl").unlink()
    with pytest.raises(DataError, match="no file is of the split 'holdout'"):
        read(tmp_path, val_split="val", test_split="holdout")


def test_a_column_says_the_side_of_each_row_and_other_values_are_rejects(tmp_path: Path) -> None:
    rows = [{"text": "a", "split": "Train"}, {"text": "b", "split": "validation"}, {"text": "c", "split": "restval"}]
    write(tmp_path / "data", rows=[*rows, {"text": "d", "split": "test"}])
    spec = SourceSpec(kind="table", path="data/rows.jsonl", split_column="split")
    found = [(row.source_split, row.defect, row.detail) for row in read_source(spec, tmp_path)]
    assert found == [
        ("train", None, None),
        ("val", None, None),
        (None, "split_unknown", "split is 'restval'"),
        ("test", None, None),
    ]


def test_what_cannot_be_split_so_is_refused_in_the_yaml() -> None:
    with pytest.raises(RecipeError, match="test_split names the test part .* val_split too"):
        SourceSpec(kind="table", path="a", test_split="test")
    with pytest.raises(RecipeError, match="split_column is for rows"):
        SourceSpec(kind="image_folder", path="a", split_column="split")


def test_folders_and_entries_of_three_parts_are_three_sides(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / name).mkdir()
    assert _side_folders(tmp_path) == {"split": "train", "val_split": "valid", "test_split": "test"}
    (tmp_path / "valid").rmdir()
    assert _side_folders(tmp_path) == {"split": "train", "val_split": "test"}
    entries = dict.fromkeys(("pets_train", "pets_val", "pets_test"))
    assert _sides(entries) == {"split": "pets_train", "val_split": "pets_val", "test_split": "pets_test"}
