"""Download the files of a model at one commit: only what cannot carry code, resumable to the byte, checked by digest.

`huggingface_hub.snapshot_download` deletes the file it is working on when it is interrupted (2.4.0), so that a broken
download of a shard of 5 GB would start again; here it resumes.
"""

import hashlib
import json
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.artifacts import MANIFEST, require_name, sha256_file
from mllm_assets.disk import no_space_is_an_error, require_space
from mllm_assets.errors import IntegrityError, ModelError, SourceError
from mllm_assets.hub.client import find_repo, read_range
from mllm_assets.hub.errors import HubRepo

GIB = 2**30
CHUNK_BYTES = 16 * 2**20
NUM_CONNECTIONS = 4  # so many chunks are in memory
DOWNLOAD_CURE = "Free space there and materialise again: the download resumes."
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
        if len(self.digest) == 64:
            return sha256_file(path) == self.digest
        return hashlib.sha1(b"blob %d\0" % self.num_bytes + path.read_bytes()).hexdigest() == self.digest


def find_snapshot(hub: HubRepo) -> tuple[str, list[SnapshotFile]]:
    """The commit of the revision and the files to fetch, the small ones first.

    Raises:
        SourceError: The Hub does not answer; says what to do.
        ModelError: It has no config.json, or no weights as safetensors.
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
    for file in files:
        if not isinstance(file.num_bytes, int) or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", str(file.digest)):
            raise SourceError(
                f"The Hub gives no size or no digest of {require_name(file.name, what=hub.repo)} in {hub.repo}, so it "
                "could not be checked. Check HF_ENDPOINT."
            )
    names = {file.name for file in files}
    if "config.json" not in names:
        raise ModelError(f"{hub.repo} at {info.sha} holds no config.json, so it is not a model. Correct {hub.setting}.")
    if not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{hub.repo} at {info.sha} has no weights as safetensors; other formats can carry code and are not "
            f"fetched. Name a repository or revision next to {hub.setting} that has them."
        )
    return info.sha, sorted(files, key=lambda file: (file.num_bytes, file.name))


def is_wanted(name: str) -> bool:
    """Whether a file at the top of a repository is of the model and cannot carry code: no *.py, *.bin, *.pt, *.pkl."""
    path = Path(name)
    # consolidated*.safetensors are the same weights in another layout
    unwanted = name == MANIFEST or name.startswith((".", "consolidated")) or "/" in name
    return not unwanted and (path.suffix in SUFFIXES or name in NAMES)


def download(
    hub: HubRepo, commit: str, files: Sequence[SnapshotFile], folder: Path, notify: Callable[[str], None]
) -> None:
    """Download exactly these files into a folder, keeping what an earlier attempt left of them.

    Raises:
        MachineError: The disk does not have enough space; nothing was fetched.
        SourceError: The Hub does not give a file, or gives one with another digest.
        ModelError: The weights' index names a shard that the repository lacks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [file for file in files if not file.is_complete(folder / file.name)]
    parts = {file.name: folder / f"{file.name}.{file.digest[:16]}.part" for file in missing}
    _delete_others(folder, {file.name for file in files if file not in missing} | {p.name for p in parts.values()})
    num_missing = sum(file.num_bytes - _size(parts[file.name]) for file in missing)
    require_space(folder.parent, num_missing, hub.repo)
    total = num_done = sum(file.num_bytes for file in files)
    num_done -= num_missing
    for file in missing:
        part = parts[file.name]
        for attempt in ("first", "last"):
            num_before = _size(part)
            for num_bytes in _append(hub, commit, file, part):
                num_done += num_bytes
                notify(f"{hub.repo}: {num_done / GIB:.2f} of {total / GIB:.2f} GiB")
            if file.is_complete(part):
                break
            part.unlink(missing_ok=True)  # what was there before may be damaged, so the complete file is fetched again
            num_done -= file.num_bytes
            if attempt == "last" or num_before == 0:
                raise SourceError(
                    f"{file.name} of {hub.repo} does not match its digest on the Hub. Materialise again; if that does "
                    "not help, check the proxy."
                )
        part.rename(folder / file.name)
    require_safe_shards(folder, f"Name another revision next to {hub.setting}.")


def _append(hub: HubRepo, commit: str, file: SnapshotFile, part: Path) -> Iterator[int]:
    """Fetch what a part lacks, in order, so that its size is the progress; yields the bytes written."""
    start = _size(part)
    ranges = [(at, min(at + CHUNK_BYTES, file.num_bytes)) for at in range(start, file.num_bytes, CHUNK_BYTES)]
    with part.open("ab") as out:
        for data in _in_order(lambda span: read_range(hub, commit, file.name, *span), ranges):
            with no_space_is_an_error(part, file.name, file.num_bytes - _size(part), cure=DOWNLOAD_CURE):
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
    except Exception:  # of any request: the others must end before the caller sees it
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:  # a cancellation does not wait for the requests under way
        pool.shutdown(wait=False, cancel_futures=True)


def require_safe_shards(folder: Path, cure: str) -> None:
    """Refuse a directory whose weights' index names what is not safetensors in that directory: libraries open it.

    Raises:
        ModelError: Names the index and the file; ends with `cure`.
    """
    for index in sorted(folder.glob("*.index.json")):
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            shards = sorted({require_name(name, what=str(index)) for name in weight_map.values()})
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            raise ModelError(f"{index} is not an index of weights: expected a `weight_map`. {cure}") from None
        except IntegrityError as error:
            raise ModelError(f"{error} {cure}") from None
        for name in shards:
            if not (folder / name).is_file():
                raise ModelError(f"{index} names {name}, which does not exist. {cure}")
            if not name.endswith(".safetensors") or not is_safetensors(folder / name):
                raise ModelError(f"{index} names {name}, which is not a safetensors file and may carry code. {cure}")


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a header, and an object."""
    with path.open("rb") as file:
        start = file.read(9)
    num_header_bytes = int.from_bytes(start[:8], "little")
    return len(start) == 9 and start[8:] == b"{" and num_header_bytes + 8 <= path.stat().st_size


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _delete_others(folder: Path, names: set[str]) -> None:
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
