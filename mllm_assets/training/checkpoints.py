"""Checkpoints of what trains: written beside their place, published by a manifest, loaded strictly.

transformers' own resume loses every trained weight of Gemma 3 without an error: it saves under hub names and loads with
`strict=False`, so that no key matches (measured with 5.23: a loss of 8.0803 before, 8.9370 after). Here a checkpoint
holds the trainable tensors under their own names, with optimizer, scheduler and random states, and is used only if
every file matches its manifest.

A checkpoint also says under which conditions it was saved: how many processes, which precision, how the model was
spread. Under others the next step would differ, so that going on from it is refused.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from mllm_assets.artifacts import find_damage, is_complete, publish, read_manifest, staging_directory
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


def seed_run(run_dir: Path, source: Path, *, with_best: bool) -> None:
    """Begin a run with a copy of another run's checkpoint, which it then resumes from as from its own.

    Args:
        run_dir: The run's directory.
        source: A complete checkpoint.
        with_best: Also copy the checkpoint that is the best one so far, which may be chosen at the end.

    Raises:
        IntegrityError: One of them is damaged or missing. Names it.
        MachineError: The disk is full.
    """
    sources = [source]
    best_step = json.loads((source / "trainer_state.json").read_text(encoding="utf-8")).get("best_global_step")
    if with_best and best_step and best_step != _step(source):
        sources.insert(0, source.with_name(f"checkpoint-{best_step}"))
    for path in sources:
        damage = find_damage(path) if is_complete(path) else "it is not there, or not complete"
        if damage is not None:
            raise IntegrityError(
                f"The checkpoint {path} cannot be used: {damage}. Name another one in resume_from_checkpoint."
            )
        num_bytes = sum(file.stat().st_size for file in path.iterdir())
        with no_space_is_an_error(run_dir / path.name, f"the copy of {path}", num_bytes):
            with staging_directory(run_dir) as staging:
                shutil.copytree(path, staging / path.name)
                publish(staging / path.name, run_dir / path.name)


def require_same_conditions(checkpoint: Path, here: Mapping[str, Any]) -> None:
    """Refuse to go on under other conditions than those of the checkpoint.

    Args:
        checkpoint: A complete one.
        here: The conditions of this run; see `DeltaTrainer.conditions`.

    Raises:
        MachineError: They differ. Names each, and what to set.
    """
    there = read_manifest(checkpoint)["conditions"]
    differ = [name for name in here if there[name] != here[name]]
    if not differ:
        return
    shown = "; ".join(f"{name} was {there[name]} and is {here[name]} now" for name in differ)
    remedies = {
        "num_processes": f"start it with {there['num_processes']} process(es)",
        "precision": "set bf16, fp16 and pure_bf16 as they were",
        "sharding": "set fsdp and deepspeed as they were",
        "device": f"start it on {there['device']}",
    }
    advice = " and ".join(remedies[name] for name in differ)
    raise MachineError(
        f"{checkpoint} cannot be resumed exactly here: {shown}. To go on from it, {advice}; "
        f"to train from the start, delete {checkpoint.parent}."
    )


def trainable_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that train, on the CPU, under the names of `named_parameters`."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def save_trainable(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Write `trainable_tensors`."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), directory / TRAINABLE_FILE, metadata={"format": "pt"})


def require_fit(model: nn.Module, saved: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Compare what `save_trainable` wrote into `directory` with what trains here: names, shapes and dtypes.

    Raises:
        IntegrityError: They are not the same. Names the first difference.
    """
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in sorted(saved.keys() | wanted.keys()):
        here, there = wanted.get(name), saved.get(name)
        if here is None or there is None or here.shape != there.shape or here.dtype != there.dtype:
            raise IntegrityError(
                f"{directory} does not fit what trains: {name} is {_shape(there)} in it, expected {_shape(here)}. "
                f"Delete {directory} and run again."
            )


def load_trainable(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors of `trainable_tensors` into a model that they fit."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved[name])


@contextmanager
def no_space_is_an_error(directory: Path, what: str, num_bytes: int) -> Iterator[None]:
    """Turn a failed write into a message about the disk, where the disk is why.

    Writers in torch and safetensors raise errors of their own without an errno, so after a failure the disk is asked
    whether it would take `num_bytes`. What was free is looked up before: half of a file may have filled the disk since.

    Raises:
        MachineError: There is no room. What was there before stays.
    """
    free_bytes = shutil.disk_usage(directory.parent).free
    try:
        yield
    except Exception as error:  # torch and safetensors have classes of their own
        if getattr(error, "errno", None) not in NO_SPACE and not _lacks_space(directory, num_bytes):
            raise
        free = f"{_size(free_bytes)} were free"
        if free_bytes > num_bytes:
            free += ": a quota or a limit of file sizes allows less"
        raise MachineError(
            f"The disk is full: {what} needs about {_size(num_bytes)} in {directory.parent}, and {free} ({error}). "
            f"What was saved before it is untouched. Free some space, or set save_total_limit: 1 in the recipe, which "
            f"keeps the newest checkpoint only; then run again: it resumes."
        ) from error


def _lacks_space(directory: Path, num_bytes: int) -> bool:
    place = directory if directory.is_dir() else directory.parent
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            os.posix_fallocate(probe.fileno(), 0, max(1, num_bytes))
    except OSError as error:
        return error.errno in NO_SPACE
    return False


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.0f} KiB"


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _shape(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
