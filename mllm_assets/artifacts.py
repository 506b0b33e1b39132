"""Artefacts on disk: built in a sibling directory, renamed, complete if and only if `manifest.json` exists."""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TextIO

from filelock import FileLock, Timeout

from mllm_assets import __version__
from mllm_assets.disk import full_disk_is_an_error
from mllm_assets.errors import DataError, IntegrityError, RecipeError

MANIFEST = "manifest.json"
DIGEST = "manifest_digest"  # its key with the digest of all others
UNNAMED = "unnamed"  # the key of what has no letter or digit in its name, and cannot be made
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 3000  # what Linux takes for a name, and for a path below a deep root


def slug(name: str, otherwise: str = "") -> str:
    """Turn a name into an asset key part: `[a-z0-9_]+`; `otherwise` is that of a name without any of these.

    Raises:
        RecipeError: It has none of these, and there is no `otherwise`.
    """
    text = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or otherwise
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


def write_text_atomic(path: Path, text: str | Iterable[str]) -> None:
    """Replace a file's text, given whole or in parts, so that a reader sees the old or the new one, never a part."""
    with _replacing(path) as file:
        file.writelines([text] if isinstance(text, str) else text)


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace a file's JSON in the same way; the complete text is never in memory."""
    with _replacing(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with full_disk_is_an_error(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # it exists only after an error
        fsync_path(path.parent)


@contextmanager
def staging_directory(parent: Path) -> Iterator[Path]:
    """A hidden directory below `parent` for content whose name is known only at the end; see `publish`.

    Those of processes that were killed are deleted first: a living one holds a lock on its own.

    Raises:
        MachineError: The disk is full.
    """
    staging = parent / f".{uuid.uuid4().hex[:8]}.tmp"
    with full_disk_is_an_error(parent):
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
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
    """A staging directory has a lock next to it, which is made first and deleted last."""
    for staging in parent.glob(".????????.tmp"):
        if not re.fullmatch(r"\.[0-9a-f]{8}\.tmp", staging.name) or not staging.with_suffix(".lock").is_file():
            continue
        try:
            with _owner_lock(staging):
                shutil.rmtree(staging, ignore_errors=True)
        except Timeout:
            continue  # its owner lives


def lock_path(directory: Path) -> Path:
    """The file by which a process locks a directory."""
    return directory.with_name(f".{directory.name}.lock")


def is_locked(lock: Path) -> bool:
    """Whether a living process holds a lock file; does not create it."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock).acquire(blocking=False):
            return False
    except Timeout:
        return True


def publish(staging: Path, target: Path) -> None:
    """Rename a finished staging directory to `target`.

    A sound `target` that already exists is kept (its content is named by digest, so it is the same); an incomplete or
    damaged one is moved aside. Of two that publish at once the first wins.
    """
    if is_sound(target):
        return
    if target.is_symlink() or target.exists():
        move_aside(target)
    try:
        staging.rename(target)
    except OSError:
        if not is_complete(target):
            raise
    fsync_path(target.parent)


def move_aside(path: Path, folder: Path | None = None) -> Path:
    """Rename what is damaged, or what nothing says whose it is, to a name that `mllm-assets gc` deletes in time.

    It stays in its folder unless another is given.
    """
    aside = path.rename((folder or path.parent) / f".{path.name.strip('.')}.{uuid.uuid4().hex[:8]}.tmp")
    os.utime(aside, follow_symlinks=False)
    return aside


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Build a directory in a hidden sibling and publish it as `target` when the block ends without an error.

    The block calls `write_manifest` last. After an error nothing is left behind.
    """
    with staging_directory(target.parent) as staging:
        yield staging
        publish(staging, target)


def write_manifest(
    directory: Path,
    payload: Mapping[str, Any],
    *,
    skip: Collection[str] = (),
    digest: Callable[[Path], str] = sha256_file,
) -> dict[str, Any]:
    """Flush every file, then publish sizes and digests together with `payload`: the directory is complete from now on.

    Names in `skip`, right below `directory`, are left out: they are complete or deleted on their own, such as a run's
    checkpoints.
    """
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = path.relative_to(directory)
        if name.parts[0] in skip:
            continue
        fsync_path(path)
        files[name.as_posix()] = {"num_bytes": path.stat().st_size, "sha256": digest(path)}
    manifest = json.loads(json.dumps({**payload, "engine_version": __version__, "files": files}))
    manifest[DIGEST] = digest_json(manifest)
    write_json_atomic(directory / MANIFEST, manifest)
    return manifest


def next_number(parent: Path) -> int:
    """One more than any artefact below `parent` has: their order, whatever the clock says. `payload` names it."""
    return 1 + max((made_order(path.parent)[0] for path in parent.glob(f"[!.]*/{MANIFEST}")), default=0)


def made_order(directory: Path) -> tuple[int, int]:
    """The sort key of complete artefacts by the order in which they were made; older ones have no number."""
    return read_manifest(directory).get("number", 0), (directory / MANIFEST).stat().st_mtime_ns


def is_complete(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def is_sound(directory: Path) -> bool:
    """Whether an artefact is complete, and each of its files is as it was written: only such a one is used again."""
    try:
        return is_complete(directory) and find_damage(directory) is None
    except IntegrityError:  # the manifest itself
        return False


class MissingKey(IntegrityError, KeyError):
    """A manifest lacks a key; also a `KeyError`, which templates take for an undefined value."""


class Manifest(dict[str, Any]):
    """The keys of a manifest; a missing key is an error that names the file."""

    def __init__(self, values: Mapping[str, Any], place: str, cure: str):
        super().__init__(values)
        self._place, self._cure = place, cure

    def __missing__(self, key: str) -> NoReturn:
        raise MissingKey(f"{self._place} has no {key!r}. {self._cure}")


def parse_manifest(text: str | bytes, place: str, cure: str) -> Manifest:
    """A manifest of the disk or of a store: an object whose `files`, where it has any, are names with digests.

    Raises:
        IntegrityError: It is something else, or a name does not stay inside the directory. Names `place`, says `cure`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise IntegrityError(f"{place} is not JSON. {cure}") from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{place}: expected an object, found {type(value).__name__}. {cure}")
    files = value.get("files", {})
    if not isinstance(files, dict):
        raise IntegrityError(f"{place}: expected `files` to be an object, found {type(files).__name__}. {cure}")
    for name, entry in files.items():
        is_folder_too = any(parent.as_posix() in files for parent in Path(require_name(name, what=place)).parents)
        described = isinstance(entry, dict) and is_digest(entry.get("sha256")) and type(entry.get("num_bytes")) is int
        if not described or entry["num_bytes"] < 0 or is_folder_too:
            raise IntegrityError(f"{place}: expected size and sha256 of the file {name!r}, found none. {cure}")
    return Manifest(value, place, cure)


def is_digest(value: object) -> bool:
    """Whether a value is a sha256 as it is written everywhere here."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def read_manifest(directory: Path) -> Manifest:
    """Read a complete artefact's manifest.

    Raises:
        IntegrityError: It is missing, so the artefact was never finished, or it is damaged.
    """
    try:
        text = (directory / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise IntegrityError(
            f"{directory} has no {MANIFEST}, so it was never finished. Materialise the asset that makes it again."
        ) from None
    except OSError as error:  # a folder, or a link to itself
        raise IntegrityError(
            f"{directory / MANIFEST} cannot be read ({error.strerror}). Run: mllm-assets doctor --repair"
        ) from None
    return parse_manifest(text, str(directory / MANIFEST), "Run: mllm-assets doctor --repair")


def find_damage(
    directory: Path, *, deep: bool = True, only: Collection[str] = (), digest: Callable[[Path], str] = sha256_file
) -> str | None:
    """Describe what does not match the manifest, or None.

    Sizes are compared, and digests if `deep`; of `only` these names right below `directory`, all by default. The
    `digest` of `FileDigests` remembers what it read.
    """
    manifest = read_manifest(directory)
    said = manifest.pop(DIGEST, None)  # earlier versions wrote none
    if said is not None and said != digest_json(manifest):
        return f"{MANIFEST} was changed"
    for name, expected in manifest["files"].items():
        if only and name.split("/")[0] not in only:
            continue
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["num_bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {expected['num_bytes']}"
        if deep and digest(path) != expected["sha256"]:
            return f"{name} does not match its digest"
    return None


def require_sound(
    directory: Path,
    cure: str,
    *,
    deep: bool = True,
    only: Collection[str] = (),
    digest: Callable[[Path], str] = sha256_file,
) -> None:
    """Refuse a complete artefact that is not as it was written; see `find_damage`.

    Raises:
        IntegrityError: Names the file, and says `cure`.
    """
    if damage := find_damage(directory, deep=deep, only=only, digest=digest):
        raise IntegrityError(f"{directory} is damaged: {damage}. {cure}")


def point_symlink(link: Path, target: Path) -> None:
    """Make `link` point to `target` (relative), replacing an earlier link in one step; IntegrityError for a folder."""
    if link.is_dir() and not link.is_symlink():
        raise IntegrityError(f"{link} is a folder, where a link belongs. Move it elsewhere and run again.")
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.symlink_to(os.path.relpath(target, link.parent))
    try:
        temporary.replace(link)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def resolved_path(root: Path, path: str | Path, *, what: str) -> Path:
    """Resolve a `path` of the user's against `root`, symlinks included.

    Raises:
        DataError: The system does not accept it as a path. Names `what` it is for.
    """
    try:
        resolved = (root / path).resolve()
        with suppress(FileNotFoundError, NotADirectoryError):
            resolved.stat()  # since Python 3.13 `resolve` and `is_file` are silent about links in a circle
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL or half a character in it, links in a circle
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{what}: {str(path)[:80]!r} cannot be a path ({why[:80]}). Correct it.") from None
    return resolved


def path_inside(root: Path, path: str | Path, *, what: str) -> Path:
    """Resolve a `path` of the user's against `root`, and refuse one that leaves it, symlinks included."""
    resolved = resolved_path(root, path, what=what)
    if not resolved.is_relative_to(root.resolve()):
        raise DataError(f"{what}: the path {str(path)!r} leaves {root}. Use a path inside that folder.")
    return resolved


def require_name(name: object, *, what: str) -> str:
    """A file's name as a manifest, a store, a hub or an archive gives it: a plain path below its owner's folder.

    Raises:
        IntegrityError: It is absolute, climbs, is written in two ways, or cannot be a path.
    """
    try:
        is_plain = (
            isinstance(name, str)
            and name not in ("", ".")
            and PurePosixPath(name).as_posix() == name
            and all(part not in ("/", "..") and len(part.encode()) <= MAX_NAME_BYTES for part in Path(name).parts)
            and len(name.encode()) <= MAX_PATH_BYTES
            and not re.search(r"[\x00-\x1f\x7f]", name)
        )
    except UnicodeEncodeError:
        is_plain = False
    if not is_plain:
        raise IntegrityError(
            f"{what} names {str(name)[:80]!r}, which is not a plain path below its folder, so nothing of it was used. "
            "Whoever can write there may want to write elsewhere: find out who did, then make it again."
        )
    assert isinstance(name, str)
    return name
