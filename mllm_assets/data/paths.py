"""Where the files of a local source are: names and patterns below the project's root, absolute, or embedded."""

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from mllm_assets.artifacts import path_inside
from mllm_assets.data.spec import SourceSpec
from mllm_assets.errors import DataError

PACKAGE_PREFIX = "package:"
_WILDCARDS = "*?["


def find_files(source: SourceSpec, root: Path) -> list[Path]:
    """The files that a spec's `path` names, patterns expanded by name.

    Raises:
        DataError: One is not there, or leaves the root; says which.
    """
    files: list[Path] = []
    for name in source.paths:
        base, pattern = _base(name, root)
        if any(sign in pattern for sign in _WILDCARDS):
            found = sorted(_resolved(base, str(path)) for path in base.glob(pattern) if path.is_file())
            missing = "no file matches"
        else:
            found = [path for path in [_resolved(base, pattern)] if path.is_file()]
            missing = f"there is no file {base / pattern}"
        if not found:
            raise DataError(f"source.path {name!r}: {missing}. Correct the path in the dataset's YAML.")
        files += found
    return list(dict.fromkeys(files))


def find_folder(source: SourceSpec, root: Path) -> Path:
    """The folder that a spec's `path` names.

    Raises:
        DataError: It is not there, or leaves the root.
    """
    base, name = _base(source.path if isinstance(source.path, str) else source.path[0], root)
    folder = _resolved(base, name)
    if not folder.is_dir():
        raise DataError(
            f"source.path {source.path!r}: there is no folder {base / name}. Correct the path in the dataset's YAML."
        )
    return folder


def common_folder(files: Sequence[Path]) -> Path:
    """The innermost folder that holds all of some files."""
    return Path(os.path.commonpath([file.parent for file in files]))


def location_of(file: Path, folder: Path, part: str | int = "") -> str:
    """Where in a source something is, for people: `a.png`, `metadata.jsonl:17` (a line), `a.parquet:row 12` (from 0).

    Args:
        file: A file of the source.
        folder: The source's folder; the file's path is shown relative to it.
        part: What of the file is meant: a line's number, a row, a tar's member.
    """
    name = file.relative_to(folder).as_posix()
    return f"{name}:{part}" if part != "" else name


def _base(name: str, root: Path) -> tuple[Path, str]:
    """An absolute path is the choice of who wrote the YAML; a relative one stays inside the root."""
    if name.startswith(PACKAGE_PREFIX):
        return Path(str(resources.files("mllm_assets") / "sample_data")), name.removeprefix(PACKAGE_PREFIX)
    path = Path(name)
    if path.is_absolute():
        return Path(path.anchor), str(path.relative_to(path.anchor))
    if ".." in path.parts:
        path_inside(root, path, what="source.path")
    return root, name


def _resolved(base: Path, name: str) -> Path:
    return path_inside(base, name, what="source.path")
