"""Pictures of a small dataset are decoded once for all epochs, to the same pixels."""

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from mllm_assets.errors import IntegrityError
from mllm_assets.file_digests import FileDigests
from mllm_assets.training.encoding import collate
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.encoding.kept_pixels import KeptPixels
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.models.load import load_processor
from tests.unit.data.made_datasets import png


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(png(number))
    return paths


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The pictures that are opened, in turn."""
    found: list[Path] = []
    load_image = collate.load_image

    def noted(path: Path, **options: Any) -> Any:
        found.append(path)
        return load_image(path, **options)

    monkeypatch.setattr(collate, "load_image", noted)
    return found


def rows_of(*pictures: Path) -> list[EncodedRow]:
    tokens = array("i", [1])
    return [EncodedRow(id=path.stem, input_ids=tokens, labels=tokens, images=(path,)) for path in pictures]


def collators(parity_dir: Path, pictures: list[Path], kept: KeptPixels) -> tuple[Collator, Collator]:
    """One that reads pictures each time, and one that keeps them."""
    processor = load_processor(parity_dir / "model")
    plain, keeping = Collator(processor), Collator(processor)
    keeping.digests = FileDigests()
    for path in pictures:
        keeping.digests.of(path)
    keeping.keep_pixels(kept)
    return plain, keeping


def test_a_kept_picture_is_opened_once_and_its_pixels_stay_the_same_to_the_bit(
    parity_dir: Path, pictures: list[Path], opened: list[Path]
) -> None:
    plain, keeping = collators(parity_dir, pictures, KeptPixels())
    first, second, third = pictures
    batches = [rows_of(first, second), rows_of(second, third, second), rows_of(third, first)]
    expected = [plain.tower_inputs(batch) for batch in batches]
    opened.clear()
    for batch, right in zip(batches, expected, strict=True):
        found = keeping.tower_inputs(batch)
        assert found.keys() == right.keys()
        assert torch.equal(found["pixel_values"], right["pixel_values"])
        assert found["pixel_values"].stride() == right["pixel_values"].stride(), "another layout, another sum"
    assert opened == pictures


def test_what_is_kept_is_bounded(parity_dir: Path, pictures: list[Path], opened: list[Path]) -> None:
    plain, _ = collators(parity_dir, pictures, KeptPixels())
    num_bytes = plain.tower_inputs(rows_of(pictures[0]))["pixel_values"].nbytes
    _, keeping = collators(parity_dir, pictures, KeptPixels(num_bytes))
    opened.clear()
    for _ in range(2):
        keeping.tower_inputs(rows_of(*pictures))
    assert opened == [*pictures, *pictures[1:]], "there was room for the first"


def test_a_kept_picture_that_changes_is_refused(parity_dir: Path, pictures: list[Path]) -> None:
    _, keeping = collators(parity_dir, pictures, KeptPixels())
    keeping.tower_inputs(rows_of(*pictures))
    pictures[1].write_bytes(png(7))
    with pytest.raises(IntegrityError, match="changed meanwhile"):
        keeping.tower_inputs(rows_of(*pictures))


def test_without_digests_a_picture_is_read_each_time(
    parity_dir: Path, pictures: list[Path], opened: list[Path]
) -> None:
    """Nothing would notice that it changed."""
    plain, _ = collators(parity_dir, pictures, KeptPixels())
    plain.keep_pixels(KeptPixels())
    for _ in range(2):
        plain.tower_inputs(rows_of(pictures[0]))
    assert opened == [pictures[0]] * 2


def test_processes_that_load_ahead_keep_nothing(parity_dir: Path, pictures: list[Path]) -> None:
    """Each would hold its own, and they end with their epoch."""
    kept = KeptPixels()
    _, keeping = collators(parity_dir, pictures, kept)
    loader = DataLoader(
        rows_of(*pictures), batch_size=3, num_workers=1, collate_fn=lambda rows: _kept(keeping, rows, kept)
    )  # pyright: ignore[reportArgumentType]
    assert list(loader) == [[False] * 3]


def _kept(keeping: Collator, rows: list[EncodedRow], kept: KeptPixels) -> list[bool]:
    keeping.tower_inputs(rows)
    return [row.images[0] in kept for row in rows]
