"""Rows encoded once: files below `cache/rows`, shared by every recipe that encodes the same rows in the same way.

    <directory>/<number>/rows.arrow
                         manifest.json      written last: the digest of the file

The directory is named by all that its tokens depend on: rows and pictures, tokenizer, turn format, limits. Each part
holds so many rows, and is complete or not there: what was interrupted goes on behind its last finished part, a damaged
part is made again, and of two processes that make one at the same time the first wins.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa

from mllm_assets.artifacts import (
    digest_json,
    is_complete,
    is_sound,
    move_aside,
    read_manifest,
    staged_directory,
    write_manifest,
)
from mllm_assets.errors import MachineError
from mllm_assets.file_digests import FileDigests
from mllm_assets.training.encoding.encode import Encoder
from mllm_assets.training.encoding.encoded_rows import EncodedRows, mapped_batches
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.encoding.row_columns import IMAGE_TOKEN_ID, SCHEMA, RowColumns
from mllm_assets.worker.protocol import Reporter, num_ranks, rank

ROWS_FILE = "rows.arrow"
ENCODING_VERSION = 1  # rises with every change of tokens, labels or columns
PART_ROWS = 16_384
NUM_QUIET = 10_000  # rows that are encoded, or pictures that are opened, in about a second
WAIT_S = 0.2
MAX_WAIT_S = 1800.0
MAX_SILENCE_S = 120.0  # of a helper, which encodes a part in a second or two
MAX_PROCESSES = 4
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source(Generic[T]):
    """What is encoded.

    Attributes:
        count: How many rows there are.
        rows: Goes through them, from the first at each call.
        encode: Encodes one.
        require_unchanged: Refuses rows that are no longer those that the directory is named by.
        folder: What pictures are stored relative to.
        image_token_id: The token whose runs are stored as their length.
        in_pairs: Each row has an `other`, too.
    """

    count: int
    rows: Callable[[], Iterable[T]]
    encode: Callable[[T], EncodedRow]
    require_unchanged: Callable[[], None]
    folder: Path
    image_token_id: int
    in_pairs: bool = False


def rows_fingerprint(encoder: Encoder, what: Any) -> str:
    """Name what an encoder makes of something: 16 hex digits."""
    return digest_json([ENCODING_VERSION, str(SCHEMA), encoder.describe(), what])[:16]


def stored_rows(directory: Path, source: Source[T], digests: FileDigests, reporter: Reporter) -> EncodedRows:
    """Return the rows of a source, encoded now as far as they are not in `directory`.

    Every process of a run makes its share of the parts, and waits for the others.

    Args:
        directory: Where they are, named by what they are made from.
        source: Where they come from.
        digests: Remembers the files that are mapped.
        reporter: Told of rows that are encoded and of damage.

    Raises:
        DataError: A row is wrong, or `cutoff_len` cuts into its images (`ImageCutError`). Names it.
        MachineError: Another process did not make its share.
    """
    parts = [directory / f"{number:05d}" for number in range(-(-source.count // PART_ROWS))]
    own = parts[rank() :: num_ranks()]
    missing = {part for part in own if not _is_whole(part)}
    for part in sorted(part for part in missing if is_complete(part)):
        reporter.warn(f"The encoded rows in {part} were damaged or others, and are encoded again.")
    if missing:
        _encode_together(source, parts, missing, reporter)
    _wait_for([part for part in parts if part not in own])
    os.utime(directory)  # when it was used last, for `mllm-assets gc`
    for part in parts:
        digests.take(part / ROWS_FILE, read_manifest(part)["files"][ROWS_FILE]["sha256"])
    batches = [batch for part in parts for batch in mapped_batches(part / ROWS_FILE, source.folder)]
    return EncodedRows(batches, in_pairs=source.in_pairs)


def shown(items: Iterable[T], count: int, stage: str, reporter: Reporter) -> Iterator[T]:
    """Yield the items; while they are many, say how many are done."""
    is_long = count > NUM_QUIET
    for done, item in enumerate(items):
        if is_long and done % 1000 == 0:
            reporter.progress(stage, done, count)
        yield item
    if is_long:
        reporter.progress(stage, count, count)


def _name(part: Path) -> str:
    return f"{part.parent.name}/{part.name}"


def _is_whole(part: Path) -> bool:
    """Whether a part is as it was written, and was written for this place."""
    return is_sound(part) and read_manifest(part).get("of") == _name(part) and (part / ROWS_FILE).is_file()


def _encode_together(source: Source[T], parts: Sequence[Path], missing: set[Path], reporter: Reporter) -> None:
    """Write the parts that are missing in as many processes as help; what one of them leaves, this one makes.

    Each goes through all rows, which is quick, and encodes its own. An error is raised here, where it is met again.
    """
    is_alone = num_ranks() > 1 or len(missing) * PART_ROWS <= 2 * NUM_QUIET
    count = 1 if is_alone else min(len(missing), _num_cores(), MAX_PROCESSES)
    shares = [set(sorted(missing)[number::count]) for number in range(count)]
    make = get_context("fork").Process
    helpers = [make(target=_help, args=(source, parts, share, os.getpid()), daemon=True) for share in shares[1:]]
    try:
        for helper in helpers:
            helper.start()
        _encode(source, parts, shares[0], reporter)
        _wait_while([helper.is_alive for helper in helpers], set().union(*shares[1:]))
    finally:
        for helper in helpers:
            if helper.is_alive():
                helper.kill()  # a part is complete or not there
                helper.join()
    if left := {part for part in missing if not _is_whole(part)}:
        _encode(source, parts, left, reporter)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _help(source: Source[T], parts: Sequence[Path], share: set[Path], parent: int) -> None:
    """Encode a share of the parts as long as the parent lives."""

    def rows() -> Iterator[T]:
        for row in source.rows():
            if os.getppid() != parent:
                raise SystemExit
            yield row

    with suppress(BaseException):  # the parent meets it, too
        _encode(replace(source, rows=rows), parts, share, Reporter())


def _wait_while(alive: Sequence[Callable[[], bool]], parts: set[Path]) -> None:
    """Wait for helpers as long as they live and bring something about."""
    num_left, began_s = len(parts), time.monotonic()
    while any(is_alive() for is_alive in alive) and time.monotonic() < began_s + MAX_SILENCE_S:
        time.sleep(WAIT_S)
        left = sum(not is_complete(part) for part in parts)
        if left < num_left:
            num_left, began_s = left, time.monotonic()


def _encode(source: Source[T], parts: Sequence[Path], missing: set[Path], reporter: Reporter) -> None:
    """Write the parts that are missing, in one pass over the rows."""
    rows = iter(shown(source.rows(), source.count, "encode", reporter))
    for part in parts:
        some = islice(rows, PART_ROWS)
        if part not in missing:
            deque(some, maxlen=0)
            continue
        with staged_directory(part) as staging:
            _write(staging / ROWS_FILE, some, source)
            source.require_unchanged()
            write_manifest(staging, {"of": _name(part)})
            if is_sound(part) and not _is_whole(part):  # it would be kept
                move_aside(part)
    deque(rows, maxlen=0)  # what follows the last row may say that the file is wrong, or that it changed


def _write(path: Path, rows: Iterable[T], source: Source[T]) -> None:
    columns = RowColumns(source.image_token_id, source.folder)
    schema = SCHEMA.with_metadata({IMAGE_TOKEN_ID: str(source.image_token_id)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in columns.batches(map(source.encode, rows)):
            writer.write_batch(batch)


def _wait_for(parts: Sequence[Path]) -> None:
    """Wait until other processes have written the rest."""
    waiting = [part for part in parts if not _is_whole(part)]
    began_s = time.monotonic()
    while waiting:
        time.sleep(WAIT_S)
        left = [part for part in waiting if not _is_whole(part)]
        began_s = began_s if len(left) == len(waiting) else time.monotonic()
        waiting = left
        if time.monotonic() > began_s + MAX_WAIT_S:
            raise MachineError(
                f"{len(waiting)} of {len(parts)} parts of the rows that other processes encode have not appeared in "
                f"{waiting[0].parent} for {MAX_WAIT_S:g} s. Put cache/ on a file system that all of them see."
            )
