"""Which samples are asked about, and which images replace another sample's."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.parsing import RowParser
from mllm_assets.data.sharegpt.row_files import FileRow
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.evaluation import samples
from mllm_assets.evaluation.samples import EncodedSamples, load_samples, spread
from mllm_assets.training.encoding.encode import Encoder
from mllm_assets.training.models.load import load_processor
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import EvaluateTask
from tests.worker_tasks import evaluation


def shuffled_partners(images: Sequence[Sequence[str]], *, seed: int) -> list[int | None]:
    names = sorted({name for own in images for name in own})
    numbers = np.array([names.index(name) for own in images for name in own])
    found = samples.shuffled_partners(numbers, np.cumsum([0, *map(len, images)]), seed=seed)
    return [None if partner < 0 else int(partner) for partner in found]


def test_a_part_of_an_entry_is_from_everywhere_in_it() -> None:
    """Rows are in the order of the source, so the first of them may all be of one class."""
    assert spread(7, 3) == [0, 2, 4]
    assert spread(120, 24)[-2:] == [110, 115]
    assert list(spread(5, None)) == list(spread(5, 5)) == list(spread(5, 9)) == [0, 1, 2, 3, 4]
    assert list(spread(0, 3)) == list(spread(0, None)) == []


def test_every_samples_images_are_used_once_and_never_by_itself() -> None:
    partners = shuffled_partners([[f"{i}.png"] for i in range(50)], seed=1)
    assert sorted(p for p in partners if p is not None) == list(range(50))
    assert all(partner != index for index, partner in enumerate(partners))


def test_partners_have_as_many_images() -> None:
    """Another number of images would not fit the placeholders."""
    images = [["a", "b"], ["c"], ["d", "e"], ["f"], [], ["g", "h", "i"]]
    assert shuffled_partners(images, seed=0) == [2, 3, 0, 1, None, None]


def test_the_same_file_does_not_stand_in_for_itself() -> None:
    """A question asked twice about one image would show no difference."""
    images = [["same"], ["same"], ["x"], ["y"]]
    partners = shuffled_partners(images, seed=3)
    assert all(p is None or images[p] != images[i] for i, p in enumerate(partners))
    assert Counter(p is None for p in partners)[False] == 4
    assert shuffled_partners([["same"], ["same"]], seed=3) == [None, None]


def test_the_same_seed_gives_the_same_partners() -> None:
    images = [[f"{i}.png"] for i in range(20)]
    assert shuffled_partners(images, seed=7) == shuffled_partners(images, seed=7)
    assert shuffled_partners(images, seed=7) != shuffled_partners(images, seed=8)


def task_of(parity_dir: Path, tmp_path: Path, **changes: Any) -> EvaluateTask:
    return evaluation(model_dir=parity_dir / "model", data_dir=parity_dir / "data", directory=tmp_path / "p", **changes)


def asked_about(task: EvaluateTask, processor: Any) -> tuple[EncodedSamples, list[tuple[str, int, Row]]]:
    found = load_samples(task, Dataset(task.data_dir, rows_root=task.rows_root))
    return found.encoded(Encoder(processor), task.rows_root, Reporter()), list(found)


def test_many_rows_are_asked_about_as_few_are(
    parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million rows, encoded in memory three times for each model, took gigabytes."""
    entries = ("gemma3_vlm_val", "gemma3_vlm_train")
    task = task_of(parity_dir, tmp_path, entries=entries, max_samples=9)
    processor = load_processor(parity_dir / "model")
    few, rows = asked_about(task, processor)
    monkeypatch.setattr(samples, "PART_ROWS", 4)
    many, same_rows = asked_about(replace(task, rows_root=tmp_path / "rows"), processor)
    assert same_rows == rows and len(list((tmp_path / "rows").glob("*/*/rows.arrow"))) == 6
    assert few.paired.tolist() == many.paired.tolist() and len(few.paired)
    for name in ("own", "swapped", "prompts"):
        assert list(getattr(few, name)) == list(getattr(many, name))
    own_images = {row.id: row.images for row in few.own}
    assert all(set(own_images[row.id]).isdisjoint(row.images) for row in few.swapped)


def test_of_an_entry_only_the_rows_that_are_asked_about_are_parsed(
    parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a million rows were held in memory for 200 samples."""
    parsed: list[int] = []

    def noted(self: RowParser, row: FileRow, index: int) -> Any:
        parsed.append(index)
        return parse(self, row, index)

    parse = RowParser.__call__
    monkeypatch.setattr(RowParser, "__call__", noted)
    task = task_of(parity_dir, tmp_path, max_samples=3)
    entry = Dataset(task.data_dir, rows_root=tmp_path).entry(task.entries[0])
    _, num_rows = entry.digest, entry.num_rows
    parsed.clear()
    load_samples(task, Dataset(task.data_dir, rows_root=tmp_path))
    assert parsed == list(spread(num_rows, 3)) and num_rows > 3
