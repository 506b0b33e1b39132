"""Tensors cached by content: immutable shards of safetensors in one folder, which only ever gains shards.

    <directory>/<digest of the names>/tensors.safetensors
                                      manifest.json          written last: names, shapes, digest of the file

A name is a digest of what its tensor was computed from, so a tensor is never computed twice, and a computation that was
killed resumes after its last finished shard. Reads go through a memory map: what is not used takes no memory, and what
is used belongs to the page cache.
"""

import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mllm_assets.artifacts import (
    MANIFEST,
    digest_json,
    find_damage,
    made_order,
    read_manifest,
    staged_directory,
    write_manifest,
)
from mllm_assets.errors import IntegrityError, MachineError, RecipeError
from mllm_assets.file_digests import FileDigests
from mllm_assets.training.models.device import Precision
from mllm_assets.worker.tasks import WHOLE, Part

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

TENSORS_FILE = "tensors.safetensors"
MAX_OPEN_SHARDS = 64
NUM_TENSORS_PER_SHARD = 64
NUM_PROBES = 3
# Of products in that dtype: two batch sizes of one model take other kernels, which add up in another order: 1e-6
# relative in float32; in bfloat16 4.5e-3 behind 27 layers, whatever dtype the sums are handed on in
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
WAIT_S = 0.2
T = TypeVar("T")


def in_passes(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield `size` items at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def probes(rows: Sequence[T]) -> Sequence[T]:
    """Return a few rows spread over all of them."""
    return rows[:: max(1, len(rows) // NUM_PROBES)][:NUM_PROBES]


def _is_readable(shard: Path) -> bool:
    """Whether a shard's manifest is there and as it was written; of others the tensors are computed again."""
    try:
        return find_damage(shard, only=[MANIFEST]) is None
    except IntegrityError:
        return False


class ShardStore:
    """One folder of shards, indexed by tensor name.

    If two processes compute a name at the same time, the shard that was published first is read, so that a resumed run
    reads what it read before.

    Attributes:
        kind: What the tensors are, for messages and as the stage that is reported: "vision_features".
    """

    kind = "tensors"

    def __init__(self, directory: Path, digests: FileDigests | None = None) -> None:
        self.directory = directory
        self._digests = digests or FileDigests()  # of the shards that are read, too
        self._read_index()

    def _read_index(self) -> None:
        if self.directory.is_dir():
            os.utime(self.directory)  # when it was used last, for `mllm-assets gc`
        self._shard_of: dict[str, str] = {}
        self._num_bytes: dict[str, int] = {}
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._last_number = 0
        shards = [path for path in self.directory.glob("[!.]*") if _is_readable(path)]
        for shard in sorted(shards, key=lambda path: (made_order(path), path.name)):
            self._index(shard)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # a loader process maps the files itself

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the names that the store does not have, in their order."""
        return [name for name in names if name not in self._shard_of]

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor, a view of the mapped file; KeyError if the name is unknown."""
        return self._opened(self._shard_of[name]).get_tensor(name)

    def any(self) -> torch.Tensor:
        """Return one of the tensors; StopIteration if the store is empty."""
        return self.get(next(iter(self._shard_of)))

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Publish one complete shard."""
        shard = self.directory / digest_json(sorted(tensors))[:16]
        with staged_directory(shard) as staging:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging / TENSORS_FILE)
            number = 1 + max(self._last_number, sum(1 for _ in self.directory.iterdir()))
            write_manifest(staging, {"names": sorted(tensors), "number": number})
        self._index(shard)

    def fill(
        self,
        names: Sequence[str],
        size: int,
        compute: Callable[[Sequence[Sequence[str]]], Iterable[Sequence[torch.Tensor]]],
        reporter: "Reporter",
        *,
        part: Part = WHOLE,
        wait: bool = True,
    ) -> int:
        """Compute shard by shard the tensors that are missing, and those in a damaged shard.

        Args:
            names: Of all tensors that are needed.
            size: How many names the model takes in one pass.
            compute: Yields for each of the passes that it is given the tensors of its names, in their order.
            reporter: Notified after each pass.
            part: Compute only these passes. A pass holds the same names however many parts there are, so that its
                tensors are the same bits.
            wait: Whether to wait for the processes that compute the other parts.

        Returns:
            How many tensors were computed.
        """
        for damage in self.drop_damaged(names) if part.count == 1 else ():
            reporter.warn(f"Cached {self._words} were damaged and are computed again: {damage}.")
        passes = list(in_passes(names, size))
        missing = self.missing(name for some in part.of(passes) for name in some)
        shards = [list(in_passes(shard, size)) for shard in in_passes(missing, NUM_TENSORS_PER_SHARD)]
        computed = iter(compute(list(chain.from_iterable(shards))))
        done = 0
        for of_shard in shards:
            tensors: dict[str, torch.Tensor] = {}
            for some in of_shard:
                tensors |= zip(some, next(computed), strict=True)
                reporter.progress(self.kind, done + len(tensors), len(missing))
            done += len(tensors)
            self._digests.require_unchanged()  # weights too, which may be mapped from their files
            self.add(tensors)
        if wait:
            self.wait_for(names)
        self._read_index()
        return len(missing)

    def require_same(
        self, row_id: str, cached: torch.Tensor, fresh: torch.Tensor, model: str, precision: Precision
    ) -> None:
        """Compare what is cached of a row with what the model computes now, in `precision`.

        Raises:
            IntegrityError: They differ by more than rounding.
            RecipeError: What it computes is not finite, as NaN, which differs from nothing.
        """
        if not fresh.isfinite().all():
            dtype = str(precision.computed).removeprefix("torch.")
            raise RecipeError(
                f"The {self._words} of row {row_id} are not finite in {dtype}. "
                "Set bf16: true, or fp16: false, which computes in float32; float16 holds no number above 65,504."
            )
        difference, allowed = float("inf"), TOLERANCE[precision.computed]
        if cached.shape == fresh.shape and cached.dtype == fresh.dtype:
            difference = float((cached.float() - fresh.float()).abs().max() / fresh.float().abs().max().clamp(min=1e-6))
        if not difference <= allowed:  # NaN too
            raise IntegrityError(
                f"The cached {self._words} of row {row_id} differ from {model} by {difference:.1e} of the largest "
                f"value, expected at most {allowed:.0e}. Delete {self.directory} and make them again."
            )

    def require_undamaged(self, names: Iterable[str]) -> None:
        """Compare the files that hold `names` with their digests, and remember them.

        Raises:
            IntegrityError: One does not match.
        """
        for shard in self._shards_of(names):
            damage = find_damage(self.directory / shard, digest=self._digests.of)
            if damage is not None:
                raise IntegrityError(
                    f"The cache {self.directory / shard} is damaged: {damage}. Run mllm-assets doctor "
                    "--repair, materialise the recipe's vision_features again if it has them, and run this again."
                )

    def drop_damaged(self, names: Iterable[str]) -> list[str]:
        """Delete the shards with `names` that do not match their digests, and return what was wrong with each."""
        found = []
        for shard in self._shards_of(names):
            damage = find_damage(self.directory / shard)
            if damage is not None:
                found.append(f"{self.directory / shard}: {damage}")
                self._open.pop(shard, None)
                shutil.rmtree(self.directory / shard)
        if found:
            self._read_index()
        return found

    def wait_for(self, names: Collection[str], *, timeout_s: float = 1800.0) -> None:
        """Wait until other processes have published the rest of `names`.

        Raises:
            MachineError: No shard appeared for `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        num_there = len(self._shard_of)
        while missing := self.missing(names):
            time.sleep(WAIT_S)
            self._read_index()
            if len(self._shard_of) > num_there:
                deadline, num_there = time.monotonic() + timeout_s, len(self._shard_of)
            if time.monotonic() > deadline:
                raise MachineError(
                    f"{len(missing)} of {len(names)} tensors that other processes compute have not appeared in "
                    f"{self.directory} for {timeout_s:g} s. Put cache/ on a file system that all of them see, or set "
                    f"feature_cache: false."
                )

    def num_bytes(self, names: Iterable[str]) -> int:
        """Return the size of the files that hold `names`."""
        return sum(self._num_bytes[shard] for shard in self._shards_of(names))

    @property
    def _words(self) -> str:
        return self.kind.replace("_", " ")

    def _shards_of(self, names: Iterable[str]) -> Collection[str]:
        return dict.fromkeys(self._shard_of[name] for name in names if name in self._shard_of)

    def _index(self, shard: Path) -> None:
        manifest = read_manifest(shard)
        self._last_number = max(self._last_number, manifest.get("number", 0))
        self._num_bytes[shard.name] = manifest["files"][TENSORS_FILE]["num_bytes"]
        for name in manifest["names"]:
            self._shard_of.setdefault(name, shard.name)

    def _opened(self, shard: str) -> Any:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        self._open[shard] = safe_open(self.directory / shard / TENSORS_FILE, framework="pt")
        return self._open[shard]


class ImageStore(ShardStore):
    """A store whose names are made from the content of image files."""

    def __init__(self, directory: Path, digests: FileDigests) -> None:
        super().__init__(directory, digests)
        self._known: dict[Path, str] = {}

    def digest(self, path: Path) -> str:
        """Return the digest that an image had when it was first asked for."""
        if path not in self._known:
            self._known[path] = self._digests.of(path)
        return self._known[path]
