"""The checks look at the files on disk, so they find what the code that wrote them would not."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.artifacts import read_manifest
from mllm_assets.data.curate.checks import counts_add_up, every_image_has_a_placeholder, splits_share_no_image
from mllm_assets.data.curate.splits import SplitResult
from mllm_assets.data.ingest.spec import DecodeLimits
from mllm_assets.data.quality import decoding
from mllm_assets.data.quality.probes import ImageMeasurement
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import encode, made_spec, picture, png, run_line, write_source

pytestmark = pytest.mark.not_fast


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
    assert outcomes[2].description == "12 raw = 8 train + 2 val + 2 test + 0 unused + 0 rejected."
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


@pytest.mark.parametrize("side", ["train", "val"])
def test_an_image_of_another_side_in_test_is_found(version: SplitResult, layout: Layout, side: str) -> None:
    name = json.loads((version.directory / f"{side}.json").read_text())[0]["images"][0]
    edit(version.directory / "test.json", lambda rows: rows[0].update(images=[name]))
    outcome = splits_share_no_image(version.directory, layout.data)
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
    assert outcome.description.startswith("12 raw is not 8 train + 2 val + 2 test + 1 unused + 0 rejected")


def test_known_bytes_are_not_decoded_again_and_changed_ones_are(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check reads every file; what it remembers is the measurement of bytes, whoever wrote them."""
    write_source(layout.root, [(png(seed), f"picture {seed}") for seed in range(10)])
    _, _, version = run_line(made_spec(), layout)
    store = QualityStore(layout.quality_db)
    decoded: list[int] = []
    measure = decoding.measure_images

    def counted(images: Iterable[bytes], limits: DecodeLimits) -> Iterator[ImageMeasurement]:
        for image in measure(images, limits):
            decoded.append(1)
            yield image

    monkeypatch.setattr(decoding, "measure_images", counted)
    assert splits_share_no_image(version.directory, layout.data, store=store).passed
    assert decoded == []
    rows = json.loads((version.directory / "train.json").read_text())
    held = json.loads((version.directory / "val.json").read_text())[0]["images"][0]
    (layout.data / rows[0]["images"][0]).write_bytes((layout.data / held).read_bytes() + b"a copy")
    assert not splits_share_no_image(version.directory, layout.data, store=store).passed
    assert len(decoded) == 1
    assert not splits_share_no_image(version.directory, layout.data, store=store).passed
    assert len(decoded) == 1


def test_one_percent_new_samples_cost_one_percent_of_decoding_and_writing(layout: Layout) -> None:
    rows = [(png(seed), f"picture {seed}") for seed in range(100)]
    write_source(layout.root, rows)
    run_line(made_spec(180, 20), layout)
    before = {path.name: path.stat().st_mtime_ns for path in layout.images.iterdir()}
    write_source(layout.root, [*rows, (png(1000), "a new one")])
    _, quality, version = run_line(made_spec(180, 20), layout)
    after = {path.name: path.stat().st_mtime_ns for path in layout.images.iterdir()}
    assert quality.num_decoded == 1
    assert version.num_raw == 101
    assert len(after.keys() - before.keys()) == 1
    assert {name: after[name] for name in before} == before
