"""Ingest: the same input gives the same bytes; a wrong source is named."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm_assets.artifacts import find_damage
from mllm_assets.data.ingest.raw_files import SAMPLES_FILE, read_raw
from mllm_assets.data.ingest.sources import ingest, read_source
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.errors import DataError, IntegrityError
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import made_spec, png, write_source


def emoji_spec() -> DatasetSpec:
    source = SourceSpec(kind="parquet", path="package:emoji.parquet", label_column="group")
    return made_spec(680, 120, name="emoji", source=source, answer="{label}")


def test_the_embedded_emoji_are_800_samples_with_class_names_as_labels(layout: Layout) -> None:
    raw = ingest(emoji_spec(), layout)
    rows = list(read_raw(raw.directory))
    assert raw.num_samples == len(rows) == 800
    assert rows[0]["caption"] == "grinning face: face, grin"
    assert {row["label"] for row in rows} >= {"Smileys & Emotion", "Food & Drink"}
    assert find_damage(raw.directory) is None


def test_the_same_source_gives_the_same_bytes_and_digest(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        layout = Layout(tmp_path / name)
        write_source(layout.root, [(png(1), "one"), (png(2), "two")])
        raw = ingest(made_spec(), layout)
        files.append((raw.digest, (raw.directory / SAMPLES_FILE).read_bytes()))
    assert files[0] == files[1]


def test_image_bytes_are_not_touched_and_repeats_have_ids_of_their_own(layout: Layout) -> None:
    write_source(layout.root, [(png(1), "one"), (b"not an image", "two"), (png(1), "one"), (None, "none")])
    rows = list(read_raw(ingest(made_spec(), layout).directory))
    assert [row["images"] for row in rows] == [[png(1)], [b"not an image"], [png(1)], [b""]]
    assert rows[2]["sample_id"] == rows[0]["sample_id"] + "-2"


def test_a_sample_keeps_its_id_when_others_are_added_before_it(tmp_path: Path) -> None:
    """An id made of the row number would move every later sample to another split."""
    ids = []
    for name, rows in (("a", [(png(1), "one")]), ("b", [(png(2), "two"), (png(1), "one")])):
        write_source(tmp_path / name, rows)
        ids.append(list(read_raw(ingest(made_spec(), Layout(tmp_path / name)).directory))[-1]["sample_id"])
    assert ids[0] == ids[1]


def test_lists_and_structs_of_images_are_read(layout: Layout) -> None:
    layout.root.mkdir(exist_ok=True)
    images = [[{"bytes": png(1), "path": "a.png"}, {"bytes": png(2), "path": None}]]
    pq.write_table(pa.table({"image": images, "text": ["two images"]}), layout.root / "source.parquet")
    assert list(read_raw(ingest(made_spec(), layout).directory))[0]["images"] == [png(1), png(2)]


def failing(layout: Layout, spec: DatasetSpec) -> str:
    with pytest.raises(DataError) as caught:
        ingest(spec, layout)
    left = [path for path in layout.root.rglob("*") if ".tmp" in path.name]
    assert left == []
    return str(caught.value)


def test_a_missing_file_is_named(layout: Layout) -> None:
    assert f"there is no file {layout.root / 'source.parquet'}" in failing(layout, made_spec())


def test_a_path_outside_the_project_is_refused(layout: Layout) -> None:
    spec = made_spec(source=SourceSpec(kind="parquet", path="../../etc/passwd"))
    assert "source.path: the path '../../etc/passwd' leaves" in failing(layout, spec)


def test_a_misspelt_column_is_named_with_the_nearest(layout: Layout) -> None:
    write_source(layout.root, [(png(1), "one")])
    spec = made_spec(source=SourceSpec(kind="parquet", path="source.parquet", caption_column="txt"))
    assert "has no column 'txt'; its columns are image, text. Did you mean 'text'?" in failing(layout, spec)


def test_a_damaged_file_is_said_to_be_so(layout: Layout) -> None:
    write_source(layout.root, [(os.urandom(5000), "one")])
    path = layout.root / "source.parquet"
    path.write_bytes(path.read_bytes()[:2000])
    assert "source.parquet cannot be read as Parquet" in failing(layout, made_spec())


def test_a_file_without_rows_is_refused(layout: Layout) -> None:
    write_source(layout.root, [])
    assert "The source of dataset 'made' has no rows" in failing(layout, made_spec())


def test_a_value_of_another_type_is_a_defect_of_its_row_that_names_it(layout: Layout) -> None:
    layout.root.mkdir(exist_ok=True)
    table = pa.table({"image": ["gone.png"], "text": [b"bytes"]})
    pq.write_table(table, layout.root / "source.parquet")
    [row] = read_source(made_spec().source, layout.root)
    assert (row.defect, row.detail) == ("image_missing", "gone.png")
    pq.write_table(table.set_column(0, "image", [[png(1)]]), layout.root / "source.parquet")
    [row] = read_source(made_spec().source, layout.root)
    assert (row.defect, row.detail) == ("caption_unreadable", "column 'text': a bytes, not a text")


def test_one_flipped_bit_in_the_ingested_file_is_noticed(layout: Layout) -> None:
    """Without page checksums a changed caption or image would be trained on."""
    write_source(layout.root, [(os.urandom(5000), "one"), (os.urandom(5000), "two")])
    raw = ingest(made_spec(), layout)
    path = raw.directory / SAMPLES_FILE
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"samples.parquet is damaged .*Materialise the raw asset again"):
        list(read_raw(raw.directory))


def test_a_source_that_an_earlier_version_ingested_is_named(layout: Layout) -> None:
    write_source(layout.root, [(png(1), "a"), (png(2), "b")])
    raw = ingest(made_spec(), layout)
    path = raw.directory / SAMPLES_FILE
    pq.write_table(pq.read_table(path).drop_columns(["fields", "source_id"]), path)
    with pytest.raises(IntegrityError, match="earlier version and has no fields, source_id. Materialise"):
        list(read_raw(raw.directory))
