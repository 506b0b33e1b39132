"""Checkpoints of what trains: written to a staging folder, published with a manifest, loaded strictly.

transformers' own resume loses every trained weight of Gemma 3 without an error: it saves under hub names and loads with
`strict=False`, so that no key matches (measured with 5.23: a loss of 8.0803 before, 8.9370 after). Here a checkpoint
holds the trainable tensors under their own names, with optimizer, scheduler and random states, and is used only if
every file matches its manifest.

A checkpoint also records the conditions under which it was saved: how many processes, which precision, how the model
was sharded. Under others the next step would differ, so resuming from it is refused. The complete model of a
checkpoint is the model that the run started from, with the trained tensors in it.
"""

import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mllm_assets.artifacts import (
    MANIFEST,
    find_damage,
    is_complete,
    publish,
    read_manifest,
    sha256_file,
    staging_directory,
)
from mllm_assets.disk import no_space_is_an_error
from mllm_assets.errors import IntegrityError, MachineError
from mllm_assets.file_digests import FileDigests
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.models import adapters, freezing, value_head
from mllm_assets.training.models.device import weights_dtype
from mllm_assets.training.models.load import cast_weights, load_config, load_model, publishing_dtype
from mllm_assets.training.models.vocabulary import extended_base
from mllm_assets.training.runs.models import starting_fingerprint
from mllm_assets.training.runs.run_file import StartingModel, read_starting_model
from mllm_assets.worker.protocol import is_first_rank

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

TRAINABLE_FILE = "trainable.safetensors"


@dataclass(frozen=True, slots=True)
class Resumable:
    """The newest checkpoint to resume from, and the newer ones that cannot be used: `name` and `reason` each."""

    path: Path | None
    step: int
    skipped: list[dict[str, str]] = field(default_factory=list)


def checkpoint_dirs(run_dir: Path) -> list[Path]:
    """Return `checkpoint-<step>` folders, oldest step first, complete or not."""
    found = [path for path in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def find_resumable(run_dir: Path, *, with_best: bool = False) -> Resumable:
    """Return the newest checkpoint whose every file matches its digest, `with_best` also those of its best one."""
    skipped = []
    for path in reversed(checkpoint_dirs(run_dir)):
        reason = _damage_of(path)
        if reason is None and with_best and (best := _best_of(path)) != path and (damage := _damage_of(best)):
            reason = f"the best checkpoint up to it, {best.name}, cannot be used: {damage}"
        if reason is None:
            return Resumable(path, _step(path), skipped)
        skipped.append({"name": path.name, "reason": reason})
    return Resumable(None, 0, skipped)


def _damage_of(checkpoint: Path) -> str | None:
    try:
        return find_damage(checkpoint)
    except IntegrityError:
        return "it has no readable manifest, so it was never finished"


def _best_of(checkpoint: Path) -> Path:
    """The best checkpoint of a run up to this one; itself where none is known."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    step = state.get("best_global_step")
    return checkpoint.with_name(f"checkpoint-{step}") if step else checkpoint


def seed_run(run_dir: Path, source: Path, *, with_best: bool) -> None:
    """Start a run with a copy of another run's checkpoint, to resume from it like from its own.

    `with_best` also copies the best checkpoint so far, which may be chosen at the end.

    Raises:
        IntegrityError: One of them is damaged or missing. Names it.
        MachineError: The disk is full.
    """
    for path in dict.fromkeys([_best_of(source), source] if with_best else [source]):
        damage = _damage_of(path)
        if damage is not None:
            raise IntegrityError(
                f"The checkpoint {path} cannot be used: {damage}. Name another one in resume_from_checkpoint."
            )
        num_bytes = sum(file.stat().st_size for file in path.iterdir())
        with no_space_is_an_error(run_dir / path.name, f"the copy of {path}", num_bytes):
            with staging_directory(run_dir) as staging:
                shutil.copytree(path, staging / path.name)
                publish(staging / path.name, run_dir / path.name)


def clean_and_find_resumable(
    run_dir: Path, resume_from: Path | None, spec: TrainSpec, reporter: "Reporter"
) -> Resumable:
    """Remove what a kill left half-written, and warn of the checkpoints that cannot be used.

    A run without checkpoints begins with a copy of `resume_from`, if the recipe names one.
    """
    for leftover in run_dir.glob(".*.tmp") if is_first_rank() else ():
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    resumable = find_resumable(run_dir, with_best=spec.evaluation_selects)
    if resume_from is not None and resumable.path is None:
        if is_first_rank():
            seed_run(run_dir, resume_from, with_best=spec.evaluation_selects)
        while not is_complete(run_dir / resume_from.name):  # where the first rank fails, torchrun ends this one
            time.sleep(0.1)
        resumable = replace(find_resumable(run_dir), skipped=resumable.skipped)
    for skipped in resumable.skipped:
        reporter.warn(f"{skipped['name']} is skipped: {skipped['reason']}.")
    return resumable


def require_same_conditions(checkpoint: Path, here: Mapping[str, Any]) -> None:
    """Refuse to resume under other conditions than those of the checkpoint; `here` is `DeltaTrainer.conditions`.

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
        f"{checkpoint} cannot be resumed exactly here: {shown}. To resume from it, {advice}; "
        f"to train from the start, delete {checkpoint.parent}, and resume_from_checkpoint if the recipe has it."
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


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _shape(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def starting_model(checkpoint: Path) -> StartingModel:
    """Return what the run of a checkpoint started from.

    Raises:
        IntegrityError: The checkpoint was never finished.
        ModelError: The run does not record it, or the model is no longer there.
    """
    if not is_complete(checkpoint):
        raise IntegrityError(
            f"The checkpoint {checkpoint} was never finished: it has no {MANIFEST}. Choose another one of "
            f"{checkpoint.parent}."
        )
    return read_starting_model(checkpoint.parent)


def base_of(checkpoint: Path, digests: FileDigests | None = None) -> Path:
    """Return the directory of the model whose parts a checkpoint holds: what its run started from, or that extended.

    Raises:
        IntegrityError, ModelError: As `starting_model`, or new tokens cannot be added to it once more.
    """
    start = starting_model(checkpoint)
    return extended_base(start.model_dir, start.spec, checkpoint.parent, digests)


def load_checkpoint(directory: Path, *, digests: FileDigests | None = None) -> Any:
    """Load a `checkpoint-<step>`, on the CPU, as the model that its run would have published at that step.

    With `digests` the model that the run started from is read and compared as well; it remembers all files.

    Raises:
        IntegrityError: The checkpoint is incomplete or damaged, its tensors are not those that train, or the model that
            the run started from is another one now.
        ModelError: That model is gone, or cannot be loaded.
    """
    start = starting_model(directory)
    damage = find_damage(directory, digest=digests.of if digests else sha256_file)
    if damage is not None:
        raise IntegrityError(
            f"The checkpoint {directory} cannot be used: {damage}. Choose another one of {directory.parent}."
        )
    if (
        start.fingerprint is not None
        and starting_fingerprint(start.model_dir, start.adapters, digests) != start.fingerprint
    ):
        raise IntegrityError(
            f"{directory} was trained from the model in {start.model_dir} with the fingerprint {start.fingerprint}, "
            f"and another model is there now. Put the model back, or train again."
        )
    base = base_of(directory, digests)
    dtype = publishing_dtype(base, weights_dtype(start.spec))
    trainable = freezing.apply(start.spec, load_model(base, dtype=dtype), start.adapters)
    saved = load_file(directory / TRAINABLE_FILE)
    if start.spec.pure_bf16:
        saved = {name: tensor.to(dtype) for name, tensor in saved.items()}
    require_fit(trainable.model, saved, directory)
    load_trainable(trainable.model, saved)
    model = adapters.merged(trainable.model) if start.spec.adds_adapters else trainable.model
    head = value_head.detach(model)  # stays in float32
    cast_weights(model, load_config(base).dtype or torch.float32)
    value_head.put_on(model, head)
    model.config.get_text_config().use_cache = model.config.use_cache = True
    return model.requires_grad_(False)
