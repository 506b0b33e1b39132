"""Tensors kept by content: immutable shards of safetensors in one folder, which only ever gains shards.

    <directory>/<digest of the names>/tensors.safetensors
                                      manifest.json          written last: names, shapes, digest of the file

A name is a digest of what its tensor was computed from, so a tensor that is there need never be computed again, and a
computation that was killed goes on behind its last finished shard. Reads go through a memory map: what is not used
takes no memory, and what is used belongs to the page cache.
"""

import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mllm_assets.artifacts import MANIFEST, digest_json, find_damage, is_complete, read_manifest, staged_directory
from mllm_assets.artifacts import write_manifest as publish_manifest
from mllm_assets.errors import IntegrityError, MachineError

TENSORS_FILE = "tensors.safetensors"
MAX_OPEN_SHARDS = 64
WAIT_S = 0.2


class ShardStore:
    """One folder of shards, indexed by tensor name.

    Of a name that two processes computed at the same time, the shard that was published first is read, so that a
    resumed run reads what it read before.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if directory.is_dir():
            os.utime(directory)  # when it was used last, for `mllm-assets gc`
        self._shard_of: dict[str, str] = {}
        self._num_bytes: dict[str, int] = {}
        self._open: OrderedDict[str, Any] = OrderedDict()
        shards = [path for path in directory.glob("*") if not path.name.startswith(".") and is_complete(path)]
        for shard in sorted(shards, key=lambda path: ((path / MANIFEST).stat().st_mtime_ns, path.name)):
            self._index(shard)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # a loader process maps the files itself

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the names that are not there, in their order."""
        return [name for name in names if name not in self._shard_of]

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor, a view of the mapped file; KeyError where the name is unknown."""
        return self._opened(self._shard_of[name]).get_tensor(name)

    def any_name(self) -> str:
        """Return a name that is there; StopIteration where the store is empty."""
        return next(iter(self._shard_of))

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Publish one shard; it is there wholly or not at all."""
        shard = self.directory / digest_json(sorted(tensors))[:16]
        with staged_directory(shard) as staging:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging / TENSORS_FILE)
            publish_manifest(staging, {"names": sorted(tensors)})
        self._index(shard)

    def require_undamaged(self, names: Iterable[str]) -> None:
        """Compare the files that hold `names` with their digests.

        Raises:
            IntegrityError: One does not match.
        """
        for shard in self._shards_of(names):
            damage = find_damage(self.directory / shard)
            if damage is not None:
                raise IntegrityError(
                    f"The cache {self.directory / shard} is damaged: {damage}. Delete that folder and run again: what "
                    f"it held is computed afresh."
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
            self.__init__(self.directory)
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
            self.__init__(self.directory)
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

    def _shards_of(self, names: Iterable[str]) -> Collection[str]:
        return dict.fromkeys(self._shard_of[name] for name in names if name in self._shard_of)

    def _index(self, shard: Path) -> None:
        manifest = read_manifest(shard)
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
