"""Checkpoints of what trains: written beside their place, published by a manifest, loaded strictly.

transformers' own resume loses every trained weight of Gemma 3 without an error: it saves under hub names and loads with
`strict=False`, so that no key matches (measured with 5.23: a loss of 8.0803 before, 8.9370 after). Here a checkpoint
holds the trainable tensors under their own names, with optimizer, scheduler and random states, and is used only if
every file matches its manifest.

Not covered: FSDP and DeepSpeed, which shard what is saved.
"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from mllm_assets.artifacts import find_damage, fsync_path, is_complete, write_manifest
from mllm_assets.errors import IntegrityError, MachineError

TRAINABLE_FILE = "trainable.safetensors"
NO_SPACE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


@dataclass(frozen=True, slots=True)
class Resumable:
    """The newest checkpoint to go on from, and the newer ones that cannot be used: `name` and `reason` each."""

    path: Path | None
    step: int
    skipped: list[dict[str, str]] = field(default_factory=list)


def checkpoint_dirs(run_dir: Path) -> list[Path]:
    """Return `checkpoint-<step>` folders, oldest step first, complete or not."""
    found = [path for path in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def find_resumable(run_dir: Path) -> Resumable:
    """Return the newest checkpoint whose every file matches its digest."""
    skipped = []
    for path in reversed(checkpoint_dirs(run_dir)):
        try:
            reason = find_damage(path)
        except IntegrityError:
            reason = "it has no readable manifest, so it was never finished"
        if reason is None:
            return Resumable(path, _step(path), skipped)
        skipped.append({"name": path.name, "reason": reason})
    return Resumable(None, 0, skipped)


def save_trainable(model: nn.Module, directory: Path) -> None:
    """Write the tensors that train, under the names of `named_parameters`."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, directory / TRAINABLE_FILE, metadata={"format": "pt"})


def load_trainable(model: nn.Module, directory: Path) -> None:
    """Load what `save_trainable` wrote; names, shapes and dtypes must be the same.

    Raises:
        IntegrityError: They are not. Names the first difference.
    """
    saved = load_file(directory / TRAINABLE_FILE)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in sorted(saved.keys() | wanted.keys()):
        here, there = wanted.get(name), saved.get(name)
        if here is None or there is None or here.shape != there.shape or here.dtype != there.dtype:
            raise IntegrityError(
                f"{directory} does not fit what trains: {name} is {_shape(there)} in it, expected {_shape(here)}. "
                f"Delete {directory} and run again."
            )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])


class DeltaTrainer(Trainer):
    """A `Trainer` whose checkpoints hold what trains, whole or not at all.

    `args.save_total_limit` counts published checkpoints; an older one goes only after a newer one is complete.
    """

    _staging: Path | None = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        save_trainable(self.accelerator.unwrap_model(self.model), Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trainable(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        damage = find_damage(best) if is_complete(best) else "it is not complete"
        if damage is not None:
            raise IntegrityError(f"The best checkpoint {best} cannot be loaded: {damage}. Delete it and run again.")
        self._load_from_checkpoint(str(best))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(str(self.args.output_dir))
        target = run_dir / f"checkpoint-{self.state.global_step}"
        staging = run_dir / f".{target.name}.tmp"
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(run_dir / f"checkpoint-{self.state.best_global_step}")
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._staging = staging
        try:
            with no_space_is_an_error(staging, f"checkpoint-{self.state.global_step}", self._checkpoint_bytes()):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_manifest(staging / target.name, {"step": self.state.global_step})
                    shutil.rmtree(target, ignore_errors=True)
                    (staging / target.name).rename(target)
                    fsync_path(run_dir)
        finally:
            self._staging = None
            self.args.save_total_limit = limit
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        if self.args.should_save and limit:
            self._drop_old(run_dir, limit)

    def _drop_old(self, run_dir: Path, limit: int) -> None:
        complete = [path for path in checkpoint_dirs(run_dir) if is_complete(path)]
        best = self.state.best_model_checkpoint
        for path in complete[:-limit]:
            if best is None or path != Path(best):
                shutil.rmtree(path)

    def _checkpoint_bytes(self) -> int:
        """Return about what one checkpoint takes: the tensors and two moments each."""
        model = self.accelerator.unwrap_model(self.model)
        return 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


@contextmanager
def no_space_is_an_error(directory: Path, what: str, num_bytes: int) -> Iterator[None]:
    """Turn a failed write into a message about the disk, where the disk is why.

    Writers in torch and safetensors raise errors of their own without an errno, so after a failure the disk is asked
    whether it would take `num_bytes`.

    Raises:
        MachineError: There is no room. What was there before stays.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) not in NO_SPACE and not _lacks_space(directory, num_bytes):
            raise
        raise MachineError(
            f"The disk is full: {what} needs about {num_bytes / 2**20:.1f} MiB in {directory.parent}, and "
            f"{_free_mib(directory.parent):.1f} MiB are free ({error}). What was saved before it is untouched. "
            f"Free some space or lower save_total_limit, then run again: it resumes."
        ) from error


def _lacks_space(directory: Path, num_bytes: int) -> bool:
    place = directory if directory.is_dir() else directory.parent
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            os.posix_fallocate(probe.fileno(), 0, max(1, num_bytes))
    except OSError as error:
        return error.errno in NO_SPACE
    return False


def _free_mib(directory: Path) -> float:
    return shutil.disk_usage(directory).free / 2**20


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _shape(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
