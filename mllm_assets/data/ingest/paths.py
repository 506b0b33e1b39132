"""Where the files of a local source are: names and patterns below the project's root, absolute, or embedded."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from mllm_assets.artifacts import path_inside
from mllm_assets.data.ingest.kinds import KINDS
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.errors import DataError
from mllm_assets.file_digests import MAX_NAMED, state_of

PACKAGE_PREFIX = "package:"
_WILDCARDS = "*?["


def find_files(source: SourceSpec, root: Path) -> list[Path]:
    """The files that a spec's `path` names, patterns expanded by name.

    Raises:
        DataError: One is missing or outside the root; says which.
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
        DataError: It is missing or outside the root.
    """
    base, name = _base(source.paths[0], root)
    folder = _resolved(base, name)
    if not folder.is_dir():
        raise DataError(
            f"source.path {source.path!r}: there is no folder {base / name}. Correct the path in the dataset's YAML."
        )
    return folder


def find_media(source: SourceSpec, root: Path) -> list[Path]:
    """The folders that a spec's `media_dir` names.

    Raises:
        DataError: One is missing or outside the root.
    """
    folders = []
    for name in source.media_dirs:
        base, name = _base(name, root)
        folder = _resolved(base, name)
        if not folder.is_dir():
            raise DataError(f"source.media_dir {name!r}: there is no folder {base / name}. Correct it in the YAML.")
        folders.append(folder)
    return folders


def common_folder(files: Sequence[Path]) -> Path:
    """The innermost folder that contains all of these files."""
    return Path(os.path.commonpath([file.parent for file in files]))


def _base(name: str, root: Path) -> tuple[Path, str]:
    """An absolute path is used as the YAML gives it; a relative one must stay inside the root."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The files of a source at one moment; another digest means that one was added, removed or changed."""

    digest: str
    num_files: int


def is_watchable(source: SourceSpec) -> bool:
    """Whether a source is the user's own files, which may change."""
    return not source.is_of_hub and not any(path.startswith(PACKAGE_PREFIX) for path in source.paths)


def list_source(source: SourceSpec, root: Path) -> Listing:
    """List a local source's files.

    Raises:
        DataError: It is missing.
    """
    found = _found(source, root)
    lines = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in found]
    if KINDS[source.kind].is_folder:
        lines.sort()
    digest = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]
    return Listing(digest=digest, num_files=len(lines))


def source_states(source: SourceSpec, root: Path) -> dict[str, tuple[int, int]]:
    """Of each file of a local source that is not hidden, what every write to it changes, and nobody can set back."""
    is_folder = KINDS[source.kind].is_folder
    return {
        name: state_of(stat)
        for name, stat in _found(source, root)
        if not (is_folder and any(part.startswith(".") for part in Path(name).parts))
    }


def require_same_source(before: Mapping[str, tuple[int, int]], source: SourceSpec, root: Path) -> None:
    """Refuse what was read if a file of `before` was written to meanwhile; one that was added since does not matter.

    Raises:
        DataError: Names the first such files.
    """
    now = source_states(source, root)
    changed = sorted(name for name, state in before.items() if now.get(name) != state)
    if changed:
        more = f" and {len(changed) - MAX_NAMED} more" if len(changed) > MAX_NAMED else ""
        raise DataError(
            f"source.path {source.path!r}: {', '.join(changed[:MAX_NAMED])}{more} changed while it was read, so some "
            f"rows may be from before and some from after. Nothing was kept. Materialise the raw asset again when "
            f"nothing writes there."
        )


def _found(source: SourceSpec, root: Path) -> list[tuple[str, os.stat_result]]:
    if KINDS[source.kind].is_folder or any((root / name).is_dir() for name in source.paths):  # as kinds of plugins may
        return list(_below(find_folder(source, root)))
    return [(str(path), path.stat()) for path in find_files(source, root)]


def _below(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    for parent, _, _ in os.walk(folder):
        with os.scandir(parent) as entries:
            for entry in entries:
                try:
                    if entry.is_file():
                        yield os.path.relpath(entry.path, folder), entry.stat()
                except FileNotFoundError:  # renamed or deleted just now: the next tick sees the result
                    continue
