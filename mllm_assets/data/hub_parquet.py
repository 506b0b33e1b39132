"""A Parquet file on the Hub as a file object: every read is one HTTP range of just the bytes asked for."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.errors import SourceError
from mllm_assets.hub import read_range
from mllm_assets.hub_errors import HubRepo

# a column of a row group is read in parts of so much, so that one of gigabytes costs little memory
BUFFER_BYTES = 8 * 2**20
FOOTER_BYTES = 64 * 2**10  # what Arrow reads first, and in most files all that it needs
BATCH_ROWS = 64


class HubFile(io.RawIOBase):
    """A file of a repository at one commit, of known size."""

    def __init__(self, hub: HubRepo, commit: str, name: str, num_bytes: int):
        self._hub, self._commit, self.name, self._num_bytes = hub, commit, name, num_bytes
        self._position = 0
        self._held, self._held_from = b"", 0

    def hold(self, start: int, stop: int) -> None:
        """Read a part with one request and serve the reads inside it from memory; replaces the part held before."""
        self._held, self._held_from = b"", 0
        self._held, self._held_from = self._fetch(start, stop), start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._num_bytes if size < 0 else min(self._position + size, self._num_bytes)
        if stop <= self._position:
            return b""
        data = self._fetch(self._position, stop)
        self._position = stop
        return data

    def _fetch(self, start: int, stop: int) -> bytes:
        if self._held_from <= start and stop <= self._held_from + len(self._held):
            return self._held[start - self._held_from : stop - self._held_from]
        parts = [(at, min(at + BUFFER_BYTES, stop)) for at in range(start, stop, BUFFER_BYTES)]
        return b"".join(read_range(self._hub, self._commit, self.name, *part) for part in parts)


class HubParquet:
    """A Parquet file on the Hub: its footer is read once, of its row groups only what is asked for."""

    def __init__(self, hub: HubRepo, commit: str, name: str, num_bytes: int):
        """Read the footer.

        Raises:
            SourceError: The Hub does not give it, or it is no Parquet file.
        """
        self.name = name
        self._hub, self._file = hub, HubFile(hub, commit, name, num_bytes)
        self._file.hold(max(num_bytes - FOOTER_BYTES, 0), num_bytes)
        with self._named_if_damaged():
            self.metadata = pq.read_metadata(self._file)
        self.schema = self.metadata.schema.to_arrow_schema()
        self._file.hold(0, 0)

    @property
    def num_rows(self) -> int:
        return self.metadata.num_rows

    def num_group_bytes(self, group: int, columns: Sequence[str]) -> int:
        """Compressed size of some columns of a row group."""
        return sum(stop - start for start, stop in self._column_ranges(group, columns))

    def batches(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a row group, a few at a time; a small group is one request, of a large one a page is in memory.

        Raises:
            SourceError: The Hub does not give them, or they are damaged.
        """
        ranges = self._column_ranges(group, columns)
        start, stop = min(start for start, _ in ranges), max(stop for _, stop in ranges)
        if stop - start <= BUFFER_BYTES:
            self._file.hold(start, stop)
        with self._named_if_damaged():
            reader = pq.ParquetFile(self._file, metadata=self.metadata, buffer_size=BUFFER_BYTES, pre_buffer=False)
            yield from reader.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(columns), use_threads=False)
        self._file.hold(0, 0)

    def _column_ranges(self, group: int, columns: Sequence[str]) -> list[tuple[int, int]]:
        parts = self.metadata.row_group(group)
        chunks = (parts.column(number) for number in range(parts.num_columns))
        needed = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
        starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in needed]
        return [(start, start + c.total_compressed_size) for start, c in zip(starts, needed, strict=True)]

    @contextmanager
    def _named_if_damaged(self) -> Iterator[None]:
        try:
            yield
        except pa.ArrowException as error:
            raise SourceError(
                f"{self.name} of {self._hub.repo} cannot be read as Parquet ({str(error).splitlines()[0]}). Set "
                f"another revision beside {self._hub.setting}, or tell the dataset's owner."
            ) from error
