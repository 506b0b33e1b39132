"""Read parts of an ingested source: texts in batches, images by row group, single images by digest."""

import binascii
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mllm_assets.errors import IntegrityError

SAMPLES_FILE = "samples.parquet"
LATER_COLUMNS = ("fields", "source_detail", "source_id")  # that earlier versions did not write
_DIGEST = np.dtype("V32")


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """Which images a source uses where.

    Attributes:
        ids: The digests of the U different images, in order of first use.
        uses_T: Each use's index into `ids`, sample by sample.
        offsets_S1: Sample s uses `uses_T[offsets_S1[s] : offsets_S1[s + 1]]`.
        group_samples: The first sample of each row group, and the number of all.
        group_images: The first new image of each row group, and U.
        text_only: The first 16 digits of the ids of samples without images, by number.
    """

    ids: pa.StringArray
    uses_T: NDArray[np.int32]
    offsets_S1: NDArray[np.int64]
    group_samples: list[int]
    group_images: list[int]
    text_only: Mapping[int, str] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return len(self.offsets_S1) - 1

    def of_group(self, group: int) -> NDArray[np.int32]:
        """The images of a row group's uses, in their order."""
        first, last = self.group_samples[group], self.group_samples[group + 1]
        return self.uses_T[self.offsets_S1[first] : self.offsets_S1[last]]


@contextmanager
def open_raw(raw: Path) -> Iterator[pq.ParquetFile]:
    """The Parquet file of an ingested source; page checksums are verified on reading.

    Raises:
        IntegrityError: The file is missing or damaged, or of an earlier version.
    """
    path = raw / SAMPLES_FILE
    try:
        # pre-buffering would keep what was read until the file is closed
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            if missing := sorted({*LATER_COLUMNS} - {*file.schema_arrow.names}):
                raise IntegrityError(
                    f"{path} was written by an earlier version and has no {', '.join(missing)}. Materialise the raw "
                    "asset again."
                )
            yield file
    except (pa.ArrowException, OSError) as error:
        cause = str(error).splitlines()[0]
        raise IntegrityError(f"{path} is damaged ({cause}). Materialise the raw asset again.") from error


def index_images(raw: Path) -> ImageIndex:
    """Read the images' digests, but no image."""
    counts, group_samples, digests = [], [0], [np.zeros(0, _DIGEST)]
    text_only: dict[int, str] = {}
    with open_raw(raw) as file:
        for group in range(file.num_row_groups):
            column = file.read_row_group(group, columns=["image_ids"]).column("image_ids").combine_chunks()
            counts.append(np.diff(column.offsets.to_numpy()).astype(np.int32))
            if len(without := np.flatnonzero(counts[-1] == 0)):
                names = file.read_row_group(group, columns=["sample_id"]).column("sample_id").to_pylist()
                text_only |= {group_samples[-1] + number: names[number][:16] for number in without.tolist()}
            digests.append(np.frombuffer(bytes.fromhex("".join(column.flatten().to_pylist())), _DIGEST))
            group_samples.append(group_samples[-1] + len(column))
    # in order of first use; as 32 bytes each, because as texts they would take three times the memory
    different, first_uses, uses = np.unique(np.concatenate(digests), return_index=True, return_inverse=True)
    order = np.argsort(first_uses)
    numbers = np.empty(len(order), np.int32)
    numbers[order] = np.arange(len(order), dtype=np.int32)
    uses = numbers[uses]
    starts = np.arange(0, 64 * len(order) + 1, 64, dtype=np.int32)
    names = binascii.hexlify(different[order].tobytes())
    ids = pa.StringArray.from_buffers(len(order), pa.py_buffer(starts), pa.py_buffer(names))
    offsets = np.concatenate([[0], *counts]).cumsum()
    highest = np.concatenate([[-1], np.maximum.accumulate(uses)]) if len(uses) else np.array([-1])
    group_images = [int(highest[offsets[sample]]) + 1 for sample in group_samples]
    return ImageIndex(ids, uses, offsets, group_samples, group_images, text_only)


def read_raw(raw: Path) -> Iterator[dict[str, Any]]:
    """The rows of an ingested source one by one; only one row group is in memory. Raises as `open_raw`."""
    with open_raw(raw) as file:
        for group in range(file.num_row_groups):  # so no batch is larger than a row group
            for batch in file.iter_batches(batch_size=64, row_groups=[group], use_threads=False):
                yield from batch.to_pylist()


def read_texts(raw: Path, columns: Sequence[str]) -> Iterator[dict]:
    """Rows without their images, one by one."""
    for batch in read_text_batches(raw, columns, 1024):
        yield from batch.to_pylist()


def read_text_batches(raw: Path, columns: Sequence[str], num_rows: int) -> Iterator[pa.RecordBatch]:
    """The same in Arrow batches of up to `num_rows`, never empty."""
    assert "images" not in columns
    with open_raw(raw) as file:
        yield from file.iter_batches(batch_size=num_rows, columns=list(columns))


def read_group_images(file: pq.ParquetFile, group: int) -> pa.Array:
    """The undecoded images of a row group, use by use."""
    return file.read_row_group(group, columns=["images"]).column("images").combine_chunks().flatten()


def find_images(raw: Path, image_ids: Collection[str]) -> dict[str, bytes]:
    """The bytes of single images; only the row groups that hold them are read."""
    index = index_images(raw)
    wanted = set(image_ids)
    numbers = {number: name for number, name in enumerate(index.ids.to_pylist()) if name in wanted}
    found: dict[str, bytes] = {}
    with open_raw(raw) as file:
        for group in range(file.num_row_groups):
            first, last = index.group_images[group], index.group_images[group + 1]
            here = {number for number in numbers if first <= number < last}
            if here:
                uses = index.of_group(group)
                images = read_group_images(file, group)
                found |= {numbers[n]: images[int(np.argmax(uses == n))].as_py() for n in here}
    return found
