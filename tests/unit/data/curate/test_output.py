"""Each format and naming of the output, read back by training's reader and by what LLaMA-Factory does with it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.data.curate.checks import every_image_has_a_placeholder, splits_share_no_image
from mllm_assets.data.ingest.spec import OutputSpec
from mllm_assets.data.ingest.split_spec import SIDES
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import DataError
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import encode, made_spec, picture, png, run_line, write_source

pytestmark = pytest.mark.not_fast

FORMATS = ("json", "jsonl", "parquet")


def as_llamafactory(data_dir: Path, name: str) -> list[tuple[Any, ...]]:
    """A restatement of LLaMA-Factory's loading and of its ShareGPT converter, on the library that it loads with."""
    import datasets

    entry = json.loads((data_dir / "dataset_info.json").read_text())[name]
    assert entry["formatting"] == "sharegpt"
    path = data_dir / entry["file_name"]
    loader = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}[path.suffix]
    rows = datasets.load_dataset(
        loader, data_files=[str(path)], split="train", cache_dir=str(data_dir.parent / "datasets_cache")
    )
    columns, tags = entry["columns"], entry["tags"]
    names = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"}
    found = []
    for row in rows:
        turns = [(names[turn[tags["role_tag"]]], turn[tags["content_tag"]]) for turn in row[columns["messages"]]]
        images = [(data_dir / image).resolve() for image in row[columns["images"]]]
        assert all(image.is_file() for image in images)
        found.append((*turns, *images))
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_by_training_and_by_llamafactory(layout: Layout, format: str) -> None:
    write_source(layout.root, [(png(n), f"picture {n}\n<b> é 日本 ") for n in range(12)])
    spec = made_spec(8, 2, output=OutputSpec(format=format), augment=("flip",), system="Be brief.")
    *_, version = run_line(spec, layout)
    pages = {"report.html", "report_samples.js"}
    files = {*(f"{side}.{format}" for side in SIDES), "images.sha256", "manifest.json", *pages}
    assert {path.name for path in version.directory.iterdir()} == files
    for side in ("train", "val"):
        rows = Dataset(layout.data).entry(f"made_{side}").rows
        expected = [(*((m.role, m.content) for m in row.messages), *row.images) for row in rows]
        assert as_llamafactory(layout.data, f"made_{side}") == expected
        assert len(rows) == {"train": 8 + version.num_augmented, "val": 2}[side]
        Dataset(layout.data).entry(f"made_{side}").require_unchanged()
    assert every_image_has_a_placeholder(version.directory, layout.data).passed
    assert splits_share_no_image(version.directory, layout.data).passed


def test_the_formats_hold_the_same_rows_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    found: dict[str, list[Any]] = {format: [] for format in FORMATS}
    for turn in ("a", "b"):
        for format in FORMATS:
            layout = Layout(tmp_path / f"{turn}_{format}")
            write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
            *_, version = run_line(made_spec(output=OutputSpec(format=format)), layout)
            rows = [
                (row.id, row.messages, [i.name for i in row.images])
                for row in Dataset(layout.data).entry("made_train").rows
            ]
            found[format].append(((version.directory / f"train.{format}").read_bytes(), rows))
    assert all(first == second for first, second in found.values())
    assert found["json"][0][1] == found["jsonl"][0][1] == found["parquet"][0][1]


def test_another_format_leaves_one_version_that_the_entry_names(layout: Layout) -> None:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    for format in ("json", "parquet"):
        run_line(made_spec(output=OutputSpec(format=format)), layout)
        assert json.loads(layout.dataset_info.read_text())["made_train"]["file_name"] == f"made/train.{format}"
        assert len(Dataset(layout.data).entry("made_train").rows) == 8


def test_images_are_named_as_the_guide_names_them(layout: Layout) -> None:
    rows: list[tuple[bytes | None, str | None]] = [(png(n), f"picture {n}") for n in range(8)]
    rows += [(encode(picture(n), "JPEG"), f"photo {n}") for n in range(8, 12)]
    write_source(layout.root, rows)
    run_line(made_spec(9, 3, output=OutputSpec(image_prefix="naruto")), layout)
    sources = {text: data for data, text in rows}
    for side, count in (("train", 9), ("val", 3)):
        found = Dataset(layout.data).entry(f"made_{side}").rows
        assert [row.images[0].stem for row in found] == [f"naruto_{side}_{n:06d}" for n in range(count)]
        for row in found:
            data = sources[row.messages[-1].content]
            assert row.images[0].read_bytes() == data, "byte for byte, in their own format"
            assert row.images[0].suffix == (".jpg" if data.startswith(b"\xff\xd8") else ".png")


def test_a_file_of_that_name_that_is_somebody_elses_is_not_replaced(layout: Layout) -> None:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    layout.images.mkdir(parents=True)
    mine = layout.images / "naruto_train_000003.png"
    mine.write_bytes(png(99))
    spec = made_spec(output=OutputSpec(image_prefix="naruto"))
    with pytest.raises(DataError, match=r"naruto_train_000003.png exists and is not this dataset's"):
        run_line(spec, layout)
    assert mine.read_bytes() == png(99)


def test_numbered_images_follow_when_the_source_changes(layout: Layout) -> None:
    """The name stays and the picture changes: the entry's digest must notice, or a run would train on other data."""
    spec = made_spec(8, 4, output=OutputSpec(image_prefix="naruto"))
    digests = []
    for first in (0, 20):
        write_source(layout.root, [(png(n), f"picture {n % 20}") for n in range(first, first + 12)])
        run_line(spec, layout)
        digests.append(Dataset(layout.data).entry("made_train").digest)
        for row in Dataset(layout.data).entry("made_train").rows:
            assert row.images[0].read_bytes() == png(first + int(row.messages[-1].content.split()[1]))
    assert digests[0] != digests[1]


def test_images_by_content_are_on_the_disk_once(layout: Layout) -> None:
    """The same picture in two samples and in two datasets is one file."""
    write_source(layout.root, [(png(n), f"{word} {n}") for n in range(6) for word in ("one", "another")])
    for name in ("made", "again"):
        run_line(made_spec(8, 4, name=name), layout)
    files = [path for path in layout.images.iterdir() if path.suffix == ".png"]
    assert len(files) == len({path.read_bytes() for path in files}) == 6
    users = Counter(
        i for name in ("made", "again") for row in Dataset(layout.data).entry(f"{name}_train").rows for i in row.images
    )
    assert set(users.values()) == {4}
