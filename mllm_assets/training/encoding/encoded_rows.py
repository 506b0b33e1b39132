"""Encoded rows in Arrow: in memory, or mapped from the files that `row_files.py` writes.

They are stored as `row_columns.py` says, and a row is put together when it is asked for.
"""

import hashlib
import mmap
import operator
import os
from array import array
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from mllm_assets.training.encoding.row import IGNORE_INDEX, EncodedRow, joined
from mllm_assets.training.encoding.row_columns import IMAGE_TOKEN_ID, LISTS, OF_ROWS, RowColumns


class Batch:
    """A stretch of rows as they are stored.

    Args:
        columns: The stored columns.
        image_token_id: Whose runs are shortened.
        folder: What the images' paths are relative to.
        place: The file and the number in it, if it is mapped.
    """

    def __init__(
        self, columns: pa.RecordBatch, image_token_id: int, folder: Path, place: tuple[Path, int] | None = None
    ) -> None:
        self.columns, self._image_token_id, self.folder, self.place = columns, image_token_id, folder, place

    def __reduce__(self) -> Any:
        if self.place is None:
            return Batch, (self.columns, self._image_token_id, self.folder)
        return _mapped, (*self.place, self.folder)  # a loader process maps the file itself

    def __len__(self) -> int:
        return self.columns.num_rows

    def apart(self) -> "Batch":
        """The same rows mapped once more: what is read of them leaves the memory with it."""
        return self if self.place is None else _mapped(*self.place, self.folder)

    def counted(self, name: str) -> np.ndarray:
        """A column of numbers, or how many values a column of lists has in each row."""
        return np.diff(self._list(name)[0]) if name in LISTS else self.columns[name].to_numpy().copy()

    def row(self, number: int) -> EncodedRow:
        """Put a row together."""
        tokens, runs = self._of("tokens", number), self._of("runs", number)
        if len(runs):
            lengths = np.ones(len(tokens), np.int64)
            lengths[tokens == self._image_token_id] = runs
            tokens = np.repeat(tokens, lengths)
        labels = np.full(len(tokens), IGNORE_INDEX, np.int32)
        stretches = self._of("stretches", number).tolist()
        for begin, end in zip(stretches[::2], stretches[1::2], strict=True):
            labels[begin:end] = tokens[begin:end]
        grids, video_grids = (self._of(name, number).tolist() for name in ("grids", "video_grids"))
        return EncodedRow(
            id=self._text("id", number),
            input_ids=array("i", tokens.tobytes()),
            labels=array("i", labels.tobytes()),
            images=self.images(number),
            num_tokens_cut=self._number("num_tokens_cut", number),
            grids_thw=tuple(zip(grids[::3], grids[1::3], grids[2::3], strict=True)),
            num_patches=self._number("num_patches", number) or None,
            num_crops=self._number("num_crops", number),
            mark={0: None, 1: True, -1: False}[self._number("mark", number)],
            text=self._text("text", number),
            videos=self.videos(number),
            video_grids_thw=tuple(zip(video_grids[::3], video_grids[1::3], video_grids[2::3], strict=True)),
            seconds_per_grid=tuple(self._of("seconds", number).tolist()),
        )

    def images(self, number: int) -> tuple[Path, ...]:
        """The pictures of a row."""
        return tuple(_path(self.folder, name.as_py()) for name in self._of("images", number))

    def videos(self, number: int) -> tuple[Path, ...]:
        """The videos of a row."""
        return tuple(_path(self.folder, name.as_py()) for name in self._of("videos", number))

    def pictures(self, numbers: np.ndarray) -> Iterator[tuple[Path, bytes, str]]:
        """Each different picture of some rows: folder and name, and the id of the first row that has it."""
        column = self.columns["images"]
        column = column if len(numbers) == len(self) else column.take(pa.array(numbers))
        encoded = column.flatten().dictionary_encode()
        kinds, first = np.unique(encoded.indices.to_numpy(), return_index=True)
        ends = np.cumsum(column.value_lengths().to_numpy())
        for kind, place in zip(kinds.tolist(), first.tolist(), strict=True):
            number = int(numbers[np.searchsorted(ends, place, "right")])
            yield self.folder, encoded.dictionary[kind].as_py(), self._text("id", number)

    def _text(self, column: str, number: int) -> str:
        return self.columns[column][number].as_py().decode("utf-8", "surrogatepass")

    def _number(self, name: str, number: int) -> int:
        return int(self._numbers[name][number])

    def _of(self, name: str, number: int) -> Any:
        ends, values = self._lists[name]
        return values[ends[number] : ends[number + 1]]

    def _list(self, name: str) -> tuple[np.ndarray, Any]:
        column = self.columns[name]
        is_numbers = LISTS[name] != pa.binary()
        return column.offsets.to_numpy(), column.values.to_numpy() if is_numbers else column.values

    @cached_property
    def _lists(self) -> dict[str, tuple[np.ndarray, Any]]:
        return {name: self._list(name) for name in LISTS}

    @cached_property
    def _numbers(self) -> dict[str, np.ndarray]:
        return {name: self.columns[name].to_numpy() for name in OF_ROWS}


def _path(folder: Path, name: bytes) -> Path:
    return Path(os.path.normpath(folder / os.fsdecode(name)))


def mapped_batches(file: Path, folder: Path) -> list[Batch]:
    """The batches of a file, of which only what is used is read."""
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    with pa.ipc.open_file(pa.py_buffer(mapped)) as reader:
        batches = [_batch(reader, file, number, folder) for number in range(reader.num_record_batches)]
    if hasattr(mmap, "MADV_DONTNEED"):  # where each begins was read, which brought in 64 KiB around it
        mapped.madvise(mmap.MADV_DONTNEED)
    return batches


def _mapped(file: Path, number: int, folder: Path) -> Batch:
    with pa.ipc.open_file(pa.memory_map(str(file))) as reader:
        return _batch(reader, file, number, folder)


def _batch(reader: pa.RecordBatchFileReader, file: Path, number: int, folder: Path) -> Batch:
    image_token_id = int(reader.schema.metadata[IMAGE_TOKEN_ID])
    return Batch(reader.get_batch(number), image_token_id, folder, (file, number))


@dataclass(frozen=True, slots=True)
class NumberedPictures:
    """The pictures of rows in memory, where rows that are mapped would bring in pages around each.

    Attributes:
        numbers: One for each picture of all rows, the same for the same.
        ends: Where those of each row end, behind a 0.
        names: Folder and name of each number.
    """

    numbers: np.ndarray
    ends: np.ndarray
    names: Sequence[tuple[Path, bytes]]

    def of(self, place: int) -> tuple[Path, ...]:
        """The pictures of a row."""
        return tuple(_path(*self.names[number]) for number in self.numbers[self.ends[place] : self.ends[place + 1]])


class EncodedRows(Sequence[EncodedRow]):
    """Rows that are put together one at a time, in any order, each alone or several packed into one sequence.

    Args:
        batches: What is stored.
        numbers: Of the stored rows those that are meant, in order; all by default.
        ends: Where each sequence of packed rows ends in `numbers`; without them rows are not packed.
        in_pairs: Behind each row its `other` is stored.

    Attributes:
        reference: Of pairs, the log-probabilities of both answers in the model that the run starts from, if known.
    """

    def __init__(
        self, batches: Sequence[Batch], numbers: np.ndarray | None = None, ends: np.ndarray | None = None,
        *, in_pairs: bool = False,
    ) -> None:  # fmt: skip
        self._batches, self._ends, self._in_pairs = batches, ends, in_pairs
        self._batch_ends = list(accumulate(len(batch) for batch in batches))
        self._numbers = np.arange(self._num_stored, dtype=np.int32)[:: 1 + in_pairs] if numbers is None else numbers
        self.reference: np.ndarray | None = None

    @classmethod
    def of(
        cls, rows: Iterable[EncodedRow], image_token_id: int = -1, folder: Path = Path("/"), *, in_pairs: bool = False
    ) -> "EncodedRows":
        """Hold rows in memory."""
        columns = RowColumns(image_token_id, folder).batches(rows)
        return cls([Batch(batch, image_token_id, folder) for batch in columns], in_pairs=in_pairs)

    @property
    def _num_stored(self) -> int:
        return self._batch_ends[-1] if self._batch_ends else 0

    def __len__(self) -> int:
        return len(self._numbers if self._ends is None else self._ends)

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...
    @overload
    def __getitem__(self, index: slice) -> "EncodedRows": ...

    def __getitem__(self, index: "int | slice") -> "EncodedRow | EncodedRows":
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        place = operator.index(index)
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError(f"there is no row {index} of {len(self)}")
        members = self._members(place)
        if self._ends is not None:
            return joined([self._stored(number) for number in members])
        row = self._stored(members[0])
        if not self._in_pairs:
            return row
        known = None if self.reference is None else tuple(self.reference[place].tolist())
        return replace(row, other=self._stored(members[0] + 1), reference=known)

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[place] for place in range(len(self)))

    def __add__(self, other: "EncodedRows") -> "EncodedRows":
        if not len(other):
            return self
        ends = None
        if self._ends is not None and other._ends is not None:
            ends = np.concatenate([self._ends, other._ends + len(self._numbers)])
        numbers = np.concatenate([self._numbers, other._numbers + self._num_stored])
        return EncodedRows([*self._batches, *other._batches], numbers, ends, in_pairs=self._in_pairs)

    @property
    def identity(self) -> list[Any]:
        """Which stored rows they are, by the names of their files and their order."""
        places = [batch.place or (batch.folder, -1) for batch in self._batches]
        files = [(file.parent.parent.name, file.parent.name, number) for file, number in places]
        return [files, hashlib.sha256(self._numbers.astype(np.int64).tobytes()).hexdigest()]

    @property
    def sequences(self) -> "EncodedRows":
        """What the model reads of them: of pairs both answers."""
        if not self._in_pairs:
            return self
        return EncodedRows(self._batches, np.stack([self._numbers, self._numbers + 1], 1).ravel())

    def take(self, places: Sequence[int]) -> "EncodedRows":
        """Return some of the rows in another order; one may come twice."""
        if places == range(len(self)):
            return self
        if self._ends is None:
            at = np.asarray(places, np.int64)
            taken = EncodedRows(self._batches, self._numbers[at], in_pairs=self._in_pairs)
            taken.reference = None if self.reference is None else self.reference[at]
            return taken
        members = [self._members(place) for place in places]
        numbers = np.concatenate([np.zeros(0, np.int64), *members])
        return EncodedRows(self._batches, numbers, np.cumsum([len(some) for some in members], dtype=np.int64))

    def packed(self, groups: Iterable[Sequence[int]]) -> "EncodedRows":
        """Return sequences of packed rows, each given as the places of its rows."""
        lengths, places = array("q"), array("q")
        for group in groups:
            lengths.append(len(group))
            places.extend(group)
        return EncodedRows(self._batches, self._numbers[np.asarray(places, np.int64)], np.cumsum(lengths))

    def counted(self, name: str) -> np.ndarray:
        """A number of each row: one of `COUNTS`, or how many `LISTS` it has, such as "images"."""
        if not len(self):
            return np.zeros(0, np.int64)
        found = np.concatenate([batch.apart().counted(name) for batch in self._batches])[self._numbers]
        if self._ends is None:
            return found
        return np.add.reduceat(found, np.concatenate([[0], self._ends[:-1]]))

    @property
    def num_different_tokens(self) -> int:
        """The tokens of all rows, equal rows counted once."""
        _, first = np.unique(self.counted("content"), return_index=True)
        return int(self.counted("num_tokens")[first].sum(dtype=np.int64))

    def pictures(self) -> Iterator[tuple[Path, str]]:
        """Each different picture, with the id of a row that has it."""
        seen: set[tuple[Path, bytes]] = set()
        numbers = np.unique(self._numbers)
        for batch, end in zip(self._batches, self._batch_ends, strict=True):
            start = end - len(batch)
            first, last = np.searchsorted(numbers, [start, end])
            for folder, name, row_id in batch.apart().pictures(numbers[first:last] - start):
                if (folder, name) not in seen:
                    seen.add((folder, name))
                    yield _path(folder, name), row_id

    def videos(self) -> Iterator[EncodedRow]:
        """Each different video as a row of its own, with the id of a row that has it."""
        seen: set[Path] = set()
        for place in np.flatnonzero(self.counted("videos")).tolist():
            row = self[place]
            for path, grid in zip(row.videos, row.video_grids_thw, strict=True):
                if path not in seen:
                    seen.add(path)
                    yield EncodedRow.of_video(path, row.id, grid)

    def numbered_pictures(self) -> "NumberedPictures":
        """The pictures of rows that are not packed, by numbers."""
        assert self._ends is None
        known: dict[tuple[Path, bytes], int] = {}
        numbers, counts = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        for batch in self._batches:
            folder, column = batch.folder, batch.apart().columns["images"]
            encoded = column.flatten().dictionary_encode()
            kinds = [known.setdefault((folder, name), len(known)) for name in encoded.dictionary.to_pylist()]
            numbers.append(np.array(kinds, np.int32)[encoded.indices.to_numpy()])
            counts.append(column.value_lengths().to_numpy())
        of_stored, begins = np.concatenate(numbers), np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        lengths = np.diff(begins)[self._numbers]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(begins[:-1][self._numbers] - ends[:-1], lengths) + np.arange(ends[-1])
        return NumberedPictures(of_stored[places], ends, list(known))

    def _members(self, place: int) -> np.ndarray:
        if self._ends is None:
            return self._numbers[place : place + 1]
        return self._numbers[self._ends[place - 1] if place else 0 : self._ends[place]]

    def _stored(self, number: int) -> EncodedRow:
        at, number = self._at(number)
        return self._batches[at].row(number)

    def _at(self, number: int) -> tuple[int, int]:
        """The batch of a stored row, and its number in that."""
        at = bisect(self._batch_ends, number)
        return at, number - (self._batch_ends[at] - len(self._batches[at]))
