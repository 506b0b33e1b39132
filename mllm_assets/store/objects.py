"""The artefact store: a bucket or folder that mirrors artefacts, so that another machine can continue from them.

    <store>/objects/<two digits>/<sha256>       content, once, whatever names it
    <store>/artifacts/<path below the root>.json    the files of an artefact with their digests, written last
    <store>/pointers/<name>.json                what changes: which release is current, which run is the latest

An artefact's path names it by digest (`outputs/mine/<fingerprint>`) or by version (`releases/mine/v1`), and never
changes. Its manifest is sent after its objects, so half an upload is invisible; the next one sends what is missing.
What is fetched is input: names stay below their folder, sizes are checked first, and before anything is renamed into
place the set of files and every digest equal the artefact's own manifest.
"""

import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import (
    MANIFEST,
    Manifest,
    find_damage,
    is_complete,
    parse_manifest,
    read_manifest,
    require_name,
    sha256_file,
    staged_directory,
)
from mllm_assets.disk import require_space
from mllm_assets.errors import IntegrityError, SourceError
from mllm_assets.store.errors import NotThere, connect, explained

NUM_TRANSFERS = 8  # at the same time
MAX_JSON_BYTES = 64 * 2**20  # the manifest of some 400,000 files


@dataclass(frozen=True, slots=True)
class Sent:
    """What one push uploaded; the store had the rest."""

    num_objects: int = 0
    num_bytes: int = 0


class Store:
    """One store, as seen from one project's root."""

    def __init__(self, url: str, root: Path) -> None:
        self.url = url.rstrip("/")
        self.root = root

    @cached_property
    def _connection(self) -> tuple[Any, str]:
        return connect(self.url)

    def push(self, directory: Path) -> Sent:
        """Mirror a complete artefact: what its manifest names, and the manifest.

        Raises:
            IntegrityError: A file is not what the manifest says, or the store has another artefact of this name.
            SourceError: The store cannot be reached, or refuses. What was sent is kept, and not sent again.
        """
        if self.holds(directory):
            return Sent()
        files = described(directory)
        sent = self.push_files({entry["sha256"]: directory / name for name, entry in files.items()})
        is_read_only = not (directory / MANIFEST).stat().st_mode & 0o200
        self._write_json(f"artifacts/{self._name(directory)}.json", {"files": files, "read_only": is_read_only})
        return sent

    def holds(self, directory: Path) -> bool:
        """Whether the store has this very artefact.

        Raises:
            IntegrityError: It has another one of this name.
        """
        name = self._name(directory)
        there = self._read_json(f"artifacts/{name}.json")
        if there is not None and there["files"] != described(directory):
            raise IntegrityError(
                f"{self.url} holds another {name} than this machine, made elsewhere, and an artefact never changes. "
                f"Move {directory} away and materialise its asset again: what is in the store is used."
            )
        return there is not None

    def push_files(self, paths: Mapping[str, Path]) -> Sent:
        """Upload files by their sha256; those that it has are not sent again. Raises as `push`."""
        there = self._sizes(paths)
        missing = {digest: path for digest, path in paths.items() if there.get(digest) != path.stat().st_size}

        def send(item: tuple[str, Path]) -> int:
            digest, path = item
            if sha256_file(path) != digest:
                raise IntegrityError(f"{path} does not match its digest, so it is not mirrored. Make it again.")
            self._ask(lambda fs, base: fs.put_file(str(path), f"{base}/{_object(digest)}"), writes=True)
            return path.stat().st_size

        return Sent(len(missing), sum(_all(send, missing.items())))

    def fetch(self, directory: Path, check: Callable[[Path], None] = lambda staging: None) -> bool:
        """Fetch an artefact to its place below the root; a complete one is left alone.

        `check` raises if the staging directory is not as expected, before it is renamed into place. Returns whether it
        is here now; False if the store has none of this name.

        Raises:
            IntegrityError: A file does not match its digest.
            SourceError: The store cannot be reached, or refuses.
        """
        name = self._name(directory)
        if is_complete(directory):
            return True
        record = self._read_json(f"artifacts/{name}.json")
        if record is None:
            return False
        files = record["files"]
        with staged_directory(directory) as staging:
            sizes = {staging / file: entry["num_bytes"] for file, entry in files.items()}
            self.fetch_files({staging / file: entry["sha256"] for file, entry in files.items()}, sizes)
            if not is_complete(staging) or described(staging) != files or find_damage(staging, deep=False):
                raise IntegrityError(
                    f"{name} of {self.url} is not what its own {MANIFEST} says: other files, sizes or digests. Delete "
                    f"artifacts/{name}.json there, and materialise the asset again on the machine that made it."
                )
            check(staging)
            if record["read_only"]:
                for path in staging.rglob("*"):
                    if path.is_file():
                        path.chmod(path.stat().st_mode & ~0o222)
        return True

    def fetch_files(self, digests: Mapping[Path, str], sizes: Mapping[Path, int] | None = None) -> None:
        """Download files by their sha256; each appears only when it is complete. Raises as `fetch`.

        A file of another size in bytes than in `sizes`, if that is given, is not downloaded.
        """

        def pull(item: tuple[Path, str]) -> None:
            path, digest = item
            self._require_size(path, digest, (sizes or {}).get(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                self._ask(lambda fs, base: fs.get_file(f"{base}/{_object(digest)}", str(temporary)), what=path.name)
                if sha256_file(temporary) != digest:
                    raise _damage(digest, f"{path.name} came from {self.url} with other bytes than were sent")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

        _all(pull, digests.items())

    def _require_size(self, path: Path, digest: str, expected: int | None) -> None:
        info = self._ask(lambda fs, base: fs.info(f"{base}/{_object(digest)}"), what=path.name)
        found, kind = info["size"], info["type"]
        if kind != "file" or found != (found if expected is None else expected):  # in a folder it may be a device
            wanted = "a file" if expected is None else f"a file of {expected}"
            raise _damage(digest, f"{path.name} is a {kind} of {found} bytes in {self.url}, expected {wanted}")
        require_space(path.parent, found, f"{path.name} from {self.url}")

    def names(self, folder: str) -> list[str]:
        """The artefacts right below a folder, by their paths below the root."""
        try:
            found = self._ask(lambda fs, base: fs.ls(f"{base}/artifacts/{folder}", detail=False))
        except NotThere:
            return []
        stems = sorted(path.rsplit("/", 1)[-1] for path in found)
        names = [stem.removesuffix(".json") for stem in stems if stem.endswith(".json")]
        return [f"{folder}/{require_name(name, what=self.url)}" for name in names]

    def point(self, name: str, value: Mapping[str, Any]) -> None:
        """Set a pointer; of two writers at once the last wins."""
        self._write_json(f"pointers/{name}.json", dict(value))

    def pointer(self, name: str) -> Manifest | None:
        """The value of a pointer, or None."""
        return self._read_json(f"pointers/{name}.json")

    def _name(self, directory: Path) -> str:
        if not directory.is_relative_to(self.root):
            raise SourceError(
                f"{directory} is outside of {self.root}, so no other machine would find it in the store. "
                "Set a relative output_dir in the recipe."
            )
        return require_name(directory.relative_to(self.root).as_posix(), what=self.url)

    def _sizes(self, digests: Iterable[str]) -> dict[str, int]:
        """Sizes of the objects that share their first digits with one of these."""

        def sizes(prefix: str) -> list[tuple[str, int]]:
            try:
                found = self._ask(lambda fs, base: fs.ls(f"{base}/objects/{prefix}", detail=True))
            except NotThere:
                return []
            return [(entry["name"].rsplit("/", 1)[-1], entry["size"]) for entry in found]

        return dict(size for part in _all(sizes, sorted({digest[:2] for digest in digests})) for size in part)

    def _read_json(self, path: str) -> Manifest | None:
        try:
            text = self._ask(lambda fs, base: fs.cat_file(f"{base}/{path}", start=0, end=MAX_JSON_BYTES))
        except NotThere:
            return None
        cure = "Delete it, and materialise its asset again where it was made."
        return parse_manifest(text, f"{self.url}/{path}", cure)

    def _write_json(self, path: str, value: Any) -> None:
        text = json.dumps(value, indent=1, sort_keys=True).encode()

        def write(fs: Any, base: str) -> None:
            if not self.url.startswith("file:"):
                fs.pipe_file(f"{base}/{path}", text)  # one request, so it is atomic
            else:
                with fs.transaction, fs.open(f"{base}/{path}", "wb") as file:  # renamed into place
                    file.write(text)

        self._ask(write, writes=True)

    def _ask(self, action: Callable[[Any, str], Any], *, what: str = "", writes: bool = False) -> Any:
        return explained(self.url, lambda: action(*self._connection), what=what, writes=writes)


def _object(digest: str) -> str:
    return f"objects/{digest[:2]}/{digest}"


def _damage(digest: str, what: str) -> IntegrityError:
    return IntegrityError(
        f"{what}: {_object(digest)} is damaged. Delete that object, and materialise the asset again on the machine "
        "that made it."
    )


def described(directory: Path) -> dict[str, Any]:
    """What the manifest names, and the manifest itself."""
    path = directory / MANIFEST
    manifest = {"num_bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return {**read_manifest(directory)["files"], MANIFEST: manifest}


def _all(action: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Run an action on each item, several at a time; the first error is raised, and no further action starts."""
    with ThreadPoolExecutor(NUM_TRANSFERS) as threads:
        futures = [threads.submit(action, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:  # Ctrl-C too: what waits in the queue must not be sent
            threads.shutdown(cancel_futures=True)
            raise
