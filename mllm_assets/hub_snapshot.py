"""Download the files of a model at one commit: what cannot carry code, resumable to the byte, checked by digest.

`huggingface_hub.snapshot_download` deletes the file it is working on when it is interrupted (2.4.0), so that a broken
download of a shard of 5 GB would start again; here it goes on.
"""

import errno
import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import MANIFEST
from mllm_assets.errors import MachineError, ModelError, SourceError
from mllm_assets.hub import find_repo, read_range
from mllm_assets.hub_errors import HubRepo

GIB = 2**30
CHUNK_BYTES = 16 * 2**20
NUM_CONNECTIONS = 4  # so many chunks are in memory
SUFFIXES = {".json", ".safetensors", ".jinja", ".txt", ".md"}
NAMES = {"tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "LICENSE", "NOTICE"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotFile:
    """A file to fetch. `digest` is its sha256, or the sha1 by which git names a small file."""

    name: str
    num_bytes: int
    digest: str

    def is_complete(self, path: Path) -> bool:
        if not path.is_file() or path.stat().st_size != self.num_bytes:
            return False
        with path.open("rb") as file:
            if len(self.digest) == 64:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.digest
            return hashlib.sha1(b"blob %d\0" % self.num_bytes + file.read()).hexdigest() == self.digest


def find_snapshot(hub: HubRepo) -> tuple[str, list[SnapshotFile]]:
    """The commit of the revision and the files to fetch, the small ones first.

    Raises:
        SourceError: The Hub does not answer; says what to do.
        ModelError: There is no config.json, or there are no weights as safetensors.
    """
    info = find_repo(hub, sizes=True)
    files = [
        SnapshotFile(
            name=item.rfilename,
            num_bytes=item.lfs.size if item.lfs else item.size,
            digest=item.lfs.sha256 if item.lfs else item.blob_id,
        )
        for item in info.siblings or ()
        if is_wanted(item.rfilename)
    ]
    names = {file.name for file in files}
    if "config.json" not in names:
        raise ModelError(f"{hub.repo} at {info.sha} holds no config.json, so it is no model. Correct {hub.setting}.")
    if not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{hub.repo} at {info.sha} has no weights as safetensors; other formats can carry code and are not "
            f"fetched. Name a repository or revision beside {hub.setting} that has them."
        )
    return info.sha, sorted(files, key=lambda file: (file.num_bytes, file.name))


def is_wanted(name: str) -> bool:
    """Whether a file at the top of a repository is of the model and cannot carry code: no *.py, *.bin, *.pt, *.pkl."""
    path = Path(name)
    # consolidated*.safetensors are the same weights once more, in another layout
    unwanted = name == MANIFEST or name.startswith((".", "consolidated")) or "/" in name
    return not unwanted and (path.suffix in SUFFIXES or name in NAMES)


def download(
    hub: HubRepo, commit: str, files: Sequence[SnapshotFile], folder: Path, say: Callable[[str], None]
) -> None:
    """Bring a folder to hold just these files, keeping what an earlier attempt left of them.

    Raises:
        MachineError: The disk has not enough space; nothing was fetched.
        SourceError: The Hub does not give a file, or gives another one than it says.
        ModelError: The weights' index names a shard that the repository has not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [file for file in files if not file.is_complete(folder / file.name)]
    parts = {file.name: folder / f"{file.name}.{file.digest[:16]}.part" for file in missing}
    _delete_others(folder, {file.name for file in files if file not in missing} | {p.name for p in parts.values()})
    num_missing = sum(file.num_bytes - _size(parts[file.name]) for file in missing)
    require_space(folder, num_missing, hub.repo)
    total = num_done = sum(file.num_bytes for file in files)
    num_done -= num_missing
    for file in missing:
        part = parts[file.name]
        for attempt in ("first", "last"):
            num_before = _size(part)
            for num_bytes in _append(hub, commit, file, part):
                num_done += num_bytes
                say(f"{hub.repo}: {num_done / GIB:.2f} of {total / GIB:.2f} GiB")
            if file.is_complete(part):
                break
            part.unlink(missing_ok=True)  # what was there before may be damaged, so it is fetched once more as a whole
            num_done -= file.num_bytes
            if attempt == "last" or num_before == 0:
                raise SourceError(
                    f"{file.name} of {hub.repo} does not match its digest on the Hub. Materialise again; if that does "
                    "not help, check the proxy."
                )
        part.rename(folder / file.name)
    _check_shards(folder, hub)


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        MachineError: Names the folder, what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise MachineError(
            f"{what} needs {num_bytes / GIB:.2f} GiB more in {folder.parent}, but only {free / GIB:.2f} GiB are free "
            f"there. Free {(num_bytes - free) / GIB:.2f} GiB, or set MLLM_ASSETS_ROOT to a folder on a larger disk."
        )


def _append(hub: HubRepo, commit: str, file: SnapshotFile, part: Path) -> Iterator[int]:
    """Fetch what a part lacks, in order, so that its size says how far it got; yields the bytes written."""
    start = _size(part)
    ranges = [(at, min(at + CHUNK_BYTES, file.num_bytes)) for at in range(start, file.num_bytes, CHUNK_BYTES)]
    with part.open("ab") as out:
        for data in _in_order(lambda span: read_range(hub, commit, file.name, *span), ranges):
            with _full_disk_named(part):
                out.write(data)
                out.flush()
            yield len(data)


def _in_order(fetch: Callable[[tuple[int, int]], bytes], ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    pending: deque[Future[bytes]] = deque()
    pool = ThreadPoolExecutor(NUM_CONNECTIONS)
    try:
        for span in ranges:
            if len(pending) == NUM_CONNECTIONS:
                yield pending.popleft().result()
            pending.append(pool.submit(fetch, span))
        while pending:
            yield pending.popleft().result()
    except Exception:  # of any request: the others must not write on when the caller hears of it
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:  # who cancels does not wait for the requests under way
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _full_disk_named(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise MachineError(
            f"The disk of {part.parent} is full. Free space there and materialise again: the download goes on."
        ) from None


def _check_shards(folder: Path, hub: HubRepo) -> None:
    for index in folder.glob("*.safetensors.index.json"):
        shards: dict[str, Any] = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        lost = sorted({name for name in shards.values() if not (folder / str(name)).is_file()})
        if lost:
            raise ModelError(
                f"{index.name} of {hub.repo} names {', '.join(lost)}, which the repository has not. Name another "
                f"revision beside {hub.setting}."
            )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _delete_others(folder: Path, names: set[str]) -> None:
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
