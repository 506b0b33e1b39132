"""Batches made in other processes: in order, by processes that stay, and with errors that name the row."""

import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from mllm_assets.errors import DataError, MachineError
from mllm_assets.file_digests import FileDigests
from mllm_assets.training.caches import shards
from mllm_assets.training.caches.features import FeatureMaker, FeatureStore, images_by_digest
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.loader import loaded
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.models.device import Precision
from mllm_assets.training.models.load import load_model, load_processor
from mllm_assets.worker.protocol import Reporter

pytestmark = pytest.mark.not_fast
GOLDEN = Path(__file__).parents[3] / "golden" / "parity"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[EncodedRow]:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        Image.new("RGB", (64, 64), (20 * number, 5, 9)).save(folder / f"{number}.png")
    return [EncodedRow.of_picture(folder / f"{number}.png", f"data[{number}]") for number in range(12)]


def collator() -> Collator:
    return Collator(load_processor(GOLDEN / "model"))


class Making:
    """Pixels of one row, and which process made them; ends itself, or hurries, at a row."""

    def __init__(self, rows: list[EncodedRow], own: Collator, *, dies_at: int | None = None) -> None:
        self.rows, self.own, self.dies_at = rows, own, dies_at

    def __call__(self, number: int) -> tuple[int, torch.Tensor]:
        pixels = self.own.tower_inputs([self.rows[number]])["pixel_values"]
        if number == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid(), pixels


def test_two_processes_make_all_batches_and_give_them_in_order_and_to_the_bit(rows: list[EncodedRow]) -> None:
    """Each shard of features had processes of its own, which load and map everything again."""
    own = collator()
    alone = [pixels for _, (_, pixels) in loaded(range(12), Making(rows, own), num_workers=0)]
    shared = list(loaded(range(12), Making(rows, own), num_workers=2, collators=[own]))
    assert [number for number, _ in shared] == list(range(12))
    assert all(torch.equal(pixels, other) for (_, (_, pixels)), other in zip(shared, alone, strict=True))
    assert len({pid for _, (pid, _) in shared}) == 2 and os.getpid() not in {pid for _, (pid, _) in shared}


def test_a_process_that_is_killed_is_an_error_that_names_its_row(rows: list[EncodedRow]) -> None:
    """A bare RuntimeError named a pid, and that memory may have run out was for the reader to guess."""
    own = collator()
    with pytest.raises(MachineError, match=r"was killed at row data\[7\]\. .* set a lower dataloader"):
        list(loaded(range(12), Making(rows, own, dies_at=7), num_workers=2, collators=[own]))


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError()])
def test_a_process_that_dies_while_it_hands_a_batch_over_is_named_too(
    rows: list[EncodedRow], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """What breaks then is the connection, before PyTorch hears of the process's end."""

    def broken(self: object, timeout: float = 0) -> None:
        raise error

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data", broken)
    own = collator()
    with pytest.raises(MachineError, match=r"was killed at row data\[0\]"):
        list(loaded(range(12), Making(rows, own, dies_at=0), num_workers=1, collators=[own]))


def test_a_damaged_picture_is_named_as_it_is_without_other_processes(rows: list[EncodedRow], tmp_path: Path) -> None:
    """PyTorch put the process's whole traceback into the message."""
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    own, damaged = collator(), [*rows[:3], EncodedRow.of_picture(tmp_path / "bad.png", "data[3]")]
    said = []
    for num_workers in (0, 2):
        with pytest.raises(DataError) as error:
            list(loaded(range(4), Making(damaged, own), num_workers=num_workers, collators=[own]))
        said.append(str(error.value))
    assert said[0] == said[1] and "bad.png of row data[3] cannot be used" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_features_of_several_shards_are_made_by_the_same_processes_to_the_bit(
    rows: list[EncodedRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(shards, "NUM_TENSORS_PER_SHARD", 4)
    model = load_model(GOLDEN / "model", dtype=dtype).eval()
    stored = EncodedRows.of(rows)
    images = images_by_digest(stored.pictures(), FileDigests())
    stores = []
    for num_workers in (0, 2):
        maker = FeatureMaker(
            model=model, collator=collator(), precision=Precision(weights=dtype, autocast=None), num_workers=num_workers
        )
        stores.append(FeatureStore(tmp_path / str(num_workers), FileDigests()))
        assert stores[-1].compute(maker, images, Reporter()) == 12
        stores[-1].require_match(maker, stored)
    assert len(list((tmp_path / "2").iterdir())) == 3
    assert all(torch.equal(stores[0].get(name), stores[1].get(name)) for name in images)
