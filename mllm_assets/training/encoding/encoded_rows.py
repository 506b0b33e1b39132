"""Encoded rows in Arrow: in memory, or mapped from the files that `row_files.py` writes.

A run of image tokens is stored as one token and its length, and labels as the stretches of tokens that are learnt, so
that a row of 256 image tokens takes a few hundred bytes. A row is put together when it is asked for.
"""

import hashlib
import operator
import os
from array import array
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from mllm_assets.training.encoding.row import IGNORE_INDEX, EncodedRow, joined

LISTS = {
    "tokens": pa.int32(),  # a run of image tokens is one of them
    "runs": pa.int32(),  # the length of each run
    "stretches": pa.int32(),  # begin and end of each stretch of labels
    "images": pa.binary(),  # paths
    "grids": pa.int32(),  # three numbers an image
}
# num_patches is 0 where they are not counted; mark is 1 for a good answer, -1 for a bad one, 0 without one
COUNTS = ("num_tokens", "num_image_tokens", "num_supervised", "num_tokens_cut", "num_patches", "num_crops", "mark")
OF_ROWS = ("num_tokens_cut", "num_patches", "num_crops", "mark")  # those that its tokens do not tell
MARKS = {None: 0, True: 1, False: -1}
BATCH_ROWS = 2048
IMAGE_TOKEN_ID = b"image_token_id"  # in a file's metadata
SCHEMA = pa.schema(
    [
        pa.field("id", pa.binary()),
        *(pa.field(name, pa.list_(kind)) for name, kind in LISTS.items()),
        *(pa.field(name, pa.int32()) for name in COUNTS),
        pa.field("content", pa.uint64()),  # of tokens and images
    ]
)


class RowColumns:
    """Collects rows as columns.

    Args:
        image_token_id: Whose runs are shortened.
        folder: What the images' paths are relative to.
    """

    def __init__(self, image_token_id: int, folder: Path) -> None:
        self._image_token_id, self._folder = image_token_id, folder
        self._names: dict[Path, bytes] = {}  # of pictures: a path is a slow thing to make relative
        self._clear()

    def _clear(self) -> None:
        self._ids: list[bytes] = []
        self._input_ids, self._labels = array("i"), array("i")
        self._images: list[bytes] = []
        self._grids = array("i")
        self._lengths = {name: array("i") for name in ("tokens", "images", "grids")}
        self._counts = {name: array("i") for name in OF_ROWS}
        self._content = bytearray()

    def batches(self, rows: Iterable[EncodedRow]) -> Iterator[pa.RecordBatch]:
        """Yield the rows in batches; behind each that has an `other` comes that."""
        for row in rows:
            self._add(row)
            if row.other is not None:
                self._add(row.other)
            if len(self._ids) >= BATCH_ROWS:
                yield self._take()
        if self._ids:
            yield self._take()

    def _add(self, row: EncodedRow) -> None:
        self._ids.append(row.id.encode("utf-8", "surrogatepass"))
        self._input_ids += row.input_ids
        self._labels += row.labels
        images = [self._name(path) for path in row.images]
        self._images += images
        for grid in row.grids_thw:
            self._grids.extend(grid)
        self._lengths["tokens"].append(len(row.input_ids))
        self._lengths["images"].append(len(images))
        self._lengths["grids"].append(3 * len(row.grids_thw))
        self._counts["num_tokens_cut"].append(row.num_tokens_cut)
        self._counts["num_patches"].append(row.num_patches or 0)
        self._counts["num_crops"].append(row.num_crops)
        self._counts["mark"].append(MARKS[row.mark])
        content = hashlib.blake2b(row.input_ids, digest_size=8)
        content.update(b"\0".join(images))
        self._content += content.digest()

    def _take(self) -> pa.RecordBatch:
        ends = _ends(self._lengths["tokens"])
        ids, labels = (np.frombuffer(values, np.int32) for values in (self._input_ids, self._labels))
        starts_row = np.zeros(len(ids) + 1, bool)
        starts_row[ends] = True
        is_image, is_learnt = ids == self._image_token_id, labels != IGNORE_INDEX
        assert (labels[is_learnt] == ids[is_learnt]).all(), "what is learnt is the token itself"
        first, end = _runs(is_image, starts_row)
        kept = ~is_image
        kept[first] = True
        begin, stop = _runs(is_learnt, starts_row)
        at_row = ends[np.searchsorted(ends, begin, "right") - 1]
        lists = {
            "tokens": (ids[kept], _before(kept)[ends]),
            "runs": (end - first, np.searchsorted(first, ends)),
            "stretches": (np.stack([begin - at_row, stop - at_row], 1).ravel(), 2 * np.searchsorted(begin, ends)),
            "images": (self._images, _ends(self._lengths["images"])),
            "grids": (self._grids, _ends(self._lengths["grids"])),
        }
        flags = {"num_image_tokens": is_image, "num_supervised": is_learnt}
        counts = {name: np.diff(_before(of_token)[ends]) for name, of_token in flags.items()} | self._counts
        counts["num_tokens"] = np.diff(ends)
        columns = [
            pa.array(self._ids, pa.binary()),
            *(pa.ListArray.from_arrays(pa.array(at, pa.int32()), pa.array(lists[name][0], LISTS[name]))
              for name in LISTS for at in [lists[name][1]]),
            *(pa.array(counts[name], pa.int32()) for name in COUNTS),
            pa.array(np.frombuffer(self._content, np.uint64).copy()),
        ]  # fmt: skip
        self._clear()
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)

    def _name(self, path: Path) -> bytes:
        if path not in self._names:
            self._names[path] = os.fsencode(os.path.relpath(path, self._folder))
        return self._names[path]


def _ends(lengths: "array[int]") -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _before(flags: np.ndarray) -> np.ndarray:
    """How many are true in front of each place, the end included."""
    return np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])


def _runs(flags: np.ndarray, starts_row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of true values begin and end; none goes over the start of a row."""
    flags = np.concatenate([[False], flags, [False]])
    before, here = flags[:-1], flags[1:]
    return np.flatnonzero(here & (~before | starts_row)), np.flatnonzero(before & (~here | starts_row))


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
        grids = self._of("grids", number).tolist()
        return EncodedRow(
            id=self._id(number),
            input_ids=array("i", tokens.tobytes()),
            labels=array("i", labels.tobytes()),
            images=tuple(_path(self.folder, name.as_py()) for name in self._of("images", number)),
            num_tokens_cut=self._number("num_tokens_cut", number),
            grids_thw=tuple(zip(grids[::3], grids[1::3], grids[2::3], strict=True)),
            num_patches=self._number("num_patches", number) or None,
            num_crops=self._number("num_crops", number),
            mark={0: None, 1: True, -1: False}[self._number("mark", number)],
        )

    def pictures(self, numbers: np.ndarray) -> Iterator[tuple[Path, bytes, str]]:
        """Each different picture of some rows: folder and name, and the id of the first row that has it."""
        column = self.columns["images"]
        column = column if len(numbers) == len(self) else column.take(pa.array(numbers))
        encoded = column.flatten().dictionary_encode()
        kinds, first = np.unique(encoded.indices.to_numpy(), return_index=True)
        ends = np.cumsum(column.value_lengths().to_numpy())
        for kind, place in zip(kinds.tolist(), first.tolist(), strict=True):
            number = int(numbers[np.searchsorted(ends, place, "right")])
            yield self.folder, encoded.dictionary[kind].as_py(), self._id(number)

    def _id(self, number: int) -> str:
        return self.columns["id"][number].as_py().decode("utf-8", "surrogatepass")

    def _number(self, name: str, number: int) -> int:
        return int(self._numbers[name][number])

    def _of(self, name: str, number: int) -> Any:
        ends, values = self._lists[name]
        return values[ends[number] : ends[number + 1]]

    def _list(self, name: str) -> tuple[np.ndarray, Any]:
        column = self.columns[name]
        is_numbers = LISTS[name] == pa.int32()
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
    with pa.ipc.open_file(pa.memory_map(str(file))) as reader:
        return [_batch(reader, file, number, folder) for number in range(reader.num_record_batches)]


def _mapped(file: Path, number: int, folder: Path) -> Batch:
    with pa.ipc.open_file(pa.memory_map(str(file))) as reader:
        return _batch(reader, file, number, folder)


def _batch(reader: pa.RecordBatchFileReader, file: Path, number: int, folder: Path) -> Batch:
    image_token_id = int(reader.schema.metadata[IMAGE_TOKEN_ID])
    return Batch(reader.get_batch(number), image_token_id, folder, (file, number))


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
    def of(cls, rows: Iterable[EncodedRow], image_token_id: int = -1, folder: Path = Path("/")) -> "EncodedRows":
        """Hold rows in memory."""
        columns = RowColumns(image_token_id, folder).batches(rows)
        return cls([Batch(batch, image_token_id, folder) for batch in columns])

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

    def _members(self, place: int) -> np.ndarray:
        if self._ends is None:
            return self._numbers[place : place + 1]
        return self._numbers[self._ends[place - 1] if place else 0 : self._ends[place]]

    def _stored(self, number: int) -> EncodedRow:
        at = bisect(self._batch_ends, number)
        return self._batches[at].row(number - (self._batch_ends[at] - len(self._batches[at])))
