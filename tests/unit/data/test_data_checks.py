"""The checks look at the files on disk, so they find what the code that wrote them would not."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_datasets import encode, made_spec, picture, png, run_line, write_source

from mllm_assets.artifacts import read_manifest
from mllm_assets.data.checks import counts_add_up, every_image_has_a_placeholder, splits_share_no_image
from mllm_assets.data.splits import SplitResult
from mllm_assets.layout import Layout


@pytest.fixture
def version(layout: Layout) -> SplitResult:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    return run_line(made_spec(), layout)[2]


def edit(path: Path, change: Any) -> None:
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


def test_a_fresh_version_passes_all(version: SplitResult, layout: Layout) -> None:
    outcomes = [
        every_image_has_a_placeholder(version.directory, layout.data),
        splits_share_no_image(version.directory, layout.data),
        counts_add_up(version),
        counts_add_up(read_manifest(version.directory)),
    ]
    assert [outcome.passed for outcome in outcomes] == [True] * 4
    assert outcomes[2].description == "12 raw = 8 train + 2 val + 2 unused + 0 rejected."
    json.dumps([outcome.metadata for outcome in outcomes])


def test_a_lost_placeholder_is_found(version: SplitResult, layout: Layout) -> None:
    edit(version.directory / "val.json", lambda rows: rows[1]["messages"][0].update(content="What?"))
    outcome = every_image_has_a_placeholder(version.directory, layout.data)
    assert not outcome.passed
    assert "val.json row 1" in outcome.description
    assert "0 placeholders, 1 images" in outcome.description


def test_a_lost_image_is_found(version: SplitResult, layout: Layout) -> None:
    name = json.loads((version.directory / "train.json").read_text())[0]["images"][0]
    (layout.data / name).unlink()
    assert f"no file {name}" in every_image_has_a_placeholder(version.directory, layout.data).description
    assert f"{name}: image_missing" in splits_share_no_image(version.directory, layout.data).description


def test_a_training_image_in_validation_is_found(version: SplitResult, layout: Layout) -> None:
    name = json.loads((version.directory / "train.json").read_text())[0]["images"][0]
    edit(version.directory / "val.json", lambda rows: rows[0].update(images=[name]))
    outcome = splits_share_no_image(version.directory, layout.data)
    assert not outcome.passed
    assert outcome.description.startswith(f"1 problems, the first: {name} = {name}")


def test_a_recompressed_training_image_in_validation_is_found(layout: Layout) -> None:
    """The same picture under another name has another digest; only its look gives it away."""
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    *_, version = run_line(made_spec(), layout)
    train = json.loads((version.directory / "train.json").read_text())
    number = int(train[0]["messages"][-1]["content"].split()[1])
    (layout.images / "copy.jpg").write_bytes(encode(picture(number).resize((48, 48)), "JPEG", quality=70))
    edit(version.directory / "val.json", lambda rows: rows[0].update(images=["images/copy.jpg"]))
    outcome = splits_share_no_image(version.directory, layout.data)
    assert not outcome.passed
    assert "images/copy.jpg" in outcome.description


def test_counts_that_do_not_add_up_are_said(version: SplitResult) -> None:
    manifest = {**read_manifest(version.directory), "num_unused": 1}
    outcome = counts_add_up(manifest)
    assert not outcome.passed
    assert outcome.description.startswith("12 raw is not 8 train + 2 val + 1 unused + 0 rejected")
