"""Rows as the columns that are stored, in memory or in the Arrow files that `row_files.py` writes.

A run of image tokens is stored as one token and its length, and labels as the stretches of tokens that are learnt, so
that a row of 256 image tokens takes a few hundred bytes.
"""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from mllm_assets.training.encoding.row import IGNORE_INDEX, EncodedRow

LISTS = {
    "tokens": pa.int32(),  # a run of image tokens is one of them
    "runs": pa.int32(),  # the length of each run
    "stretches": pa.int32(),  # begin and end of each stretch of labels
    "images": pa.binary(),  # paths
    "grids": pa.int32(),  # three numbers an image
    "videos": pa.binary(),  # paths
    "video_grids": pa.int32(),
    "seconds": pa.float64(),  # that a step in time of each lasts
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
        pa.field("text", pa.binary()),  # of rendered rows
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
        self._grids, self._video_grids = array("i"), array("i")
        self._videos: list[bytes] = []
        self._seconds = array("d")
        self._lengths = {name: array("i") for name in ("tokens", "images", "grids", "videos")}
        self._counts = {name: array("i") for name in OF_ROWS}
        self._content = bytearray()
        self._texts: list[bytes] = []

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
        videos = [self._name(path) for path in row.videos]
        self._videos += videos
        for grid in row.video_grids_thw:
            self._video_grids.extend(grid)
        self._seconds.extend(row.seconds_per_grid)
        self._lengths["videos"].append(len(videos))
        self._lengths["tokens"].append(len(row.input_ids))
        self._lengths["images"].append(len(images))
        self._lengths["grids"].append(3 * len(row.grids_thw))
        self._counts["num_tokens_cut"].append(row.num_tokens_cut)
        self._counts["num_patches"].append(row.num_patches or 0)
        self._counts["num_crops"].append(row.num_crops)
        self._counts["mark"].append(MARKS[row.mark])
        self._texts.append(row.text.encode("utf-8", "surrogatepass"))
        content = hashlib.blake2b(row.input_ids, digest_size=8)
        content.update(b"\0".join([*images, *videos]))
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
        video_ends = _ends(self._lengths["videos"])
        lists = {
            "tokens": (ids[kept], _before(kept)[ends]),
            "runs": (end - first, np.searchsorted(first, ends)),
            "stretches": (np.stack([begin - at_row, stop - at_row], 1).ravel(), 2 * np.searchsorted(begin, ends)),
            "images": (self._images, _ends(self._lengths["images"])),
            "grids": (self._grids, _ends(self._lengths["grids"])),
            "videos": (self._videos, video_ends),
            "video_grids": (self._video_grids, 3 * video_ends),
            "seconds": (self._seconds, video_ends),
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
            pa.array(self._texts, pa.binary()),
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
