"""Rows that come in one order and are wanted in another, on the disk meanwhile."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import orjson


class RowSpool:
    """Rows by number: added in any order, each number once, and read back by it.

    What is held in memory for a row are 16 bytes.
    """

    def __init__(self, path: Path, num_rows: int) -> None:
        """Start a new file.

        Args:
            path: Where the rows are kept until the block ends.
            num_rows: One more than the largest number.
        """
        self._path = path
        self._file = path.open("w+b")
        self._starts = np.zeros(num_rows, np.int64)
        self._lengths = np.zeros(num_rows, np.int64)
        self._end = 0

    def add(self, number: int, row: dict[str, Any]) -> None:
        content = orjson.dumps(row)
        self._file.write(content)
        self._starts[number], self._lengths[number] = self._end, len(content)
        self._end += len(content)

    def __len__(self) -> int:
        return int(np.count_nonzero(self._lengths))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._file.flush()
        for number in np.flatnonzero(self._lengths).tolist():
            content = os.pread(self._file.fileno(), int(self._lengths[number]), int(self._starts[number]))
            yield orjson.loads(content)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink()


class Joined:
    """The rows of several spools, one after another, as often as they are asked for."""

    def __init__(self, spools: Sequence[RowSpool]) -> None:
        self._spools = spools

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for spool in self._spools:
            yield from spool
