"""What a local source looks like from outside: names, sizes and times of its files, without reading one."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.data.paths import PACKAGE_PREFIX, find_files, find_folder
from mllm_assets.data.spec import SourceSpec

FOLDER_KINDS = ("image_folder", "llamafactory")


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The files of a source at one moment; another digest means that one came, went or was written."""

    digest: str
    num_files: int


def is_watchable(source: SourceSpec) -> bool:
    """Whether a source is files of a person's own, which may change."""
    return source.kind != "huggingface" and not any(path.startswith(PACKAGE_PREFIX) for path in source.paths)


def list_source(source: SourceSpec, root: Path) -> Listing:
    """List a local source's files.

    Raises:
        DataError: It is not there.
    """
    if source.kind in FOLDER_KINDS:
        folder = find_folder(source, root)
        lines = sorted(_lines_of(folder, folder))
    else:
        lines = [_line(str(path), path.stat()) for path in find_files(source, root)]
    digest = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]
    return Listing(digest=digest, num_files=len(lines))


def _lines_of(folder: Path, top: Path) -> Iterator[str]:
    for parent, _, _ in os.walk(folder):
        with os.scandir(parent) as entries:
            for entry in entries:
                try:
                    if entry.is_file():
                        yield _line(os.path.relpath(entry.path, top), entry.stat())
                except FileNotFoundError:  # it was renamed or deleted just now: the next tick sees how it ended
                    continue


def _line(name: str, stat: os.stat_result) -> str:
    return f"{name} {stat.st_size} {stat.st_mtime_ns}"
