"""The frozen part of a base's weight file, without what a recipe trains: written once, linked by each run's model.

A part is named by the digest of the file that it is taken from and by the tensors in it. Its bytes are the file's own,
copied range by range, so that neither a model nor a device is in between. It is read-only, since runs and releases may
be the same file; `gc` deletes the name that was not used for long, and what a run has linked stays.
"""

import json
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from mllm_assets.artifacts import (
    digest_json,
    find_damage,
    is_complete,
    move_aside,
    read_manifest,
    staged_directory,
    write_manifest,
)
from mllm_assets.errors import IntegrityError
from mllm_assets.file_digests import FileDigests

PART = "frozen.safetensors"
COPIED_AT_ONCE = 64 * 2**20
READ_ONLY = 0o444


def frozen_part(file: Path, names: Collection[str], kept: Path, digests: FileDigests) -> Path:
    """Return a file with these tensors of `file`, below `kept`, and let `digests` know its digest.

    One that exists is used without being read: whoever publishes it compares its tensors, see `withdraw`.
    """
    directory = kept / digests.of(file)[:16] / digest_json(sorted(names))[:16]
    if not _is_there(directory):
        with staged_directory(directory) as staging:
            extract(file, names, staging / PART)
            digests.require_unchanged([file])
            (staging / PART).chmod(READ_ONLY)
            write_manifest(staging, {"of": digests.of(file), "num_tensors": len(names)})
    os.utime(directory)  # for `gc`
    digests.take(directory / PART, read_manifest(directory)["files"][PART]["sha256"])
    return directory / PART


def withdraw(part: Path) -> None:
    """Move a part aside that does not hold what it should, so that the next run makes another."""
    if part.name == PART:
        with suppress(FileNotFoundError):  # another process did
            move_aside(part.parent)


def _is_there(directory: Path) -> bool:
    try:
        return is_complete(directory) and find_damage(directory, deep=False) is None
    except IntegrityError:  # its manifest
        return False


def extract(file: Path, names: Collection[str], target: Path) -> None:
    """Write a safetensors file of some of another's tensors, in its order; little of it is in memory at a time."""
    with file.open("rb") as old, target.open("xb") as new:
        length = int.from_bytes(old.read(8), "little")
        header: dict[str, Any] = json.loads(old.read(length))
        chosen = sorted((header[name]["data_offsets"], name) for name in names)
        entries, end = {}, 0
        for (first, last), name in chosen:
            entries[name] = header[name] | {"data_offsets": [end, end + last - first]}
            end += last - first
        metadata = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
        text = json.dumps(metadata | entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the format's own padding
        new.write(len(text).to_bytes(8, "little") + text)
        for (first, last), _ in chosen:
            _copy(old, new, 8 + length + first, last - first)


def _copy(old: BinaryIO, new: BinaryIO, start: int, num_bytes: int) -> None:
    old.seek(start)
    while num_bytes:
        block = old.read(min(num_bytes, COPIED_AT_ONCE))
        if not block:
            raise IntegrityError(f"{old.name} ends before its last tensor. Download or make the model again.")
        new.write(block)
        num_bytes -= len(block)
