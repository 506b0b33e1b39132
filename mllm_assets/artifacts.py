"""Artefacts on disk: built beside their place, renamed into it, complete if and only if `manifest.json` exists."""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout

from mllm_assets import __version__
from mllm_assets.errors import DataError, IntegrityError, RecipeError

MANIFEST = "manifest.json"


def slug(name: str) -> str:
    """Turn a name into an asset key part: `[a-z0-9_]+`."""
    text = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if not text:
        raise RecipeError(f"The name {name!r} has no letter or digit. Give it one, for example 'my_dataset'.")
    return text


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """sha256 over the canonical JSON of a value: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a file's text so that a reader sees the old or the new one, never a part."""
    with _replacing(path) as file:
        file.write(text)


def write_json_atomic(path: Path, value: Any) -> None:
    """Likewise; the text is never in memory as a whole."""
    with _replacing(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # gone already where all went well
    fsync_path(path.parent)


@contextmanager
def staging_directory(parent: Path) -> Iterator[Path]:
    """A hidden directory below `parent` for content whose name is known only at the end; see `publish`.

    Those of processes that were killed are deleted first: a living one holds a lock on its own.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    staging = parent / f".{uuid.uuid4().hex[:8]}.tmp"
    with _owner_lock(staging):
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _owner_lock(staging: Path) -> Iterator[None]:
    lock = FileLock(staging.with_suffix(".lock"))
    with lock.acquire(blocking=False):
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)


def _sweep(parent: Path) -> None:
    for staging in parent.glob(".????????.tmp"):
        try:
            with _owner_lock(staging):
                shutil.rmtree(staging, ignore_errors=True)
        except Timeout:
            continue  # its owner lives


def publish(staging: Path, target: Path) -> None:
    """Rename a finished staging directory to `target`.

    A complete `target` that already exists is kept (its content is named by digest, so it is the same); an
    incomplete one is replaced. Of two that publish at once the first wins.
    """
    if is_complete(target):
        return
    shutil.rmtree(target, ignore_errors=True)
    try:
        staging.rename(target)
    except OSError:
        if not is_complete(target):
            raise
    fsync_path(target.parent)


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Build a directory in a hidden sibling and publish it as `target` when the block ends without an error.

    The block calls `write_manifest` last. After an error nothing is left behind.
    """
    with staging_directory(target.parent) as staging:
        yield staging
        publish(staging, target)


def write_manifest(directory: Path, payload: Mapping[str, Any], *, skip: Collection[str] = ()) -> dict[str, Any]:
    """Flush every file, then publish sizes and digests beside `payload`: the directory is complete from now on.

    Args:
        directory: What the manifest speaks for.
        payload: What else it says.
        skip: Names right below `directory` that it does not speak for, because they are complete or deleted on their
            own, such as a run's checkpoints.
    """
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = path.relative_to(directory)
        if name.parts[0] in skip:
            continue
        fsync_path(path)
        files[name.as_posix()] = {"num_bytes": path.stat().st_size, "sha256": sha256_file(path)}
    manifest = {**payload, "engine_version": __version__, "files": files}
    write_json_atomic(directory / MANIFEST, manifest)
    return manifest


def is_complete(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read a complete artefact's manifest.

    Raises:
        IntegrityError: There is none, so the artefact was never finished.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("no object")
        return manifest
    except FileNotFoundError:
        raise IntegrityError(
            f"{directory} has no {MANIFEST}, so it was never finished. Materialise the asset that makes it again."
        ) from None
    except ValueError:
        raise IntegrityError(
            f"{directory / MANIFEST} is not JSON. Delete {directory} and materialise it again."
        ) from None


def find_damage(directory: Path, *, deep: bool = True, only: Collection[str] = ()) -> str | None:
    """Say what does not match the manifest, or None.

    Args:
        directory: A complete artefact.
        deep: Compare digests, otherwise sizes only.
        only: Names right below `directory` to look at; all by default.
    """
    for name, expected in read_manifest(directory)["files"].items():
        if only and name.split("/")[0] not in only:
            continue
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["num_bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {expected['num_bytes']}"
        if deep and sha256_file(path) != expected["sha256"]:
            return f"{name} does not match its digest"
    return None


def point_symlink(link: Path, target: Path) -> None:
    """Make `link` point to `target` (relative), replacing an earlier link in one step."""
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.symlink_to(os.path.relpath(target, link.parent))
    try:
        temporary.replace(link)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def path_inside(root: Path, path: str | Path, *, what: str) -> Path:
    """Resolve `path` against `root` and refuse one that leaves it, symlinks included."""
    try:
        resolved = (root / path).resolve()
        resolved.is_file()  # what the system takes for no path at all, it says here
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL or half a character in it, links in a circle
        raise DataError(f"{what}: {str(path)[:80]!r} cannot be a path ({error}). Correct it.") from None
    if not resolved.is_relative_to(root.resolve()):
        raise DataError(f"{what}: the path {str(path)!r} leaves {root}. Use a path inside that folder.")
    return resolved
