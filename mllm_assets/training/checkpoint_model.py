"""The whole model that a `checkpoint-<step>` stands for: what the run started from, with what was trained over it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mllm_assets.artifacts import MANIFEST, find_damage, is_complete
from mllm_assets.errors import IntegrityError, ModelError
from mllm_assets.training import freezing
from mllm_assets.training.checkpoints import TRAINABLE_FILE, load_trainable, require_fit
from mllm_assets.training.device import weights_dtype
from mllm_assets.training.model import cast_weights, load_config, load_model
from mllm_assets.training.model_directory import model_fingerprint
from mllm_assets.training.run_file import keep_for_life, read_run_file
from mllm_assets.training.spec import TrainSpec

_KEY = "starts_from"


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a run started from: the model's directory, its fingerprint at that time (or None), and the recipe."""

    model_dir: Path
    fingerprint: str | None
    spec: TrainSpec


def remember_beginning(run_dir: Path, model_dir: Path, fingerprint: str | None, spec: TrainSpec) -> None:
    """Write into `run.json` what the run starts from; the path is relative, so that a project may move."""
    relative = os.path.relpath(model_dir.resolve(), run_dir.resolve())
    keep_for_life(run_dir, _KEY, {"model_dir": relative, "fingerprint": fingerprint, "recipe": spec.to_dict()})


def read_beginning(checkpoint: Path) -> Beginning:
    """Return what the run of a checkpoint started from.

    Raises:
        IntegrityError: The checkpoint was never finished.
        ModelError: The run does not say it, or the model is not there any more.
    """
    if not is_complete(checkpoint):
        raise IntegrityError(
            f"The checkpoint {checkpoint} was never finished: it has no {MANIFEST}. Choose another one of "
            f"{checkpoint.parent}."
        )
    run_dir = checkpoint.parent
    kept: Mapping[str, Any] | None = read_run_file(run_dir).get(_KEY)
    if kept is None:
        raise ModelError(
            f"{run_dir} does not say which model it started from, so its checkpoints cannot be put over it. Train it "
            f"again, or use its finished model: {run_dir / 'model'}."
        )
    model_dir = (run_dir.resolve() / kept["model_dir"]).resolve()
    if not (model_dir / "config.json").is_file():
        raise ModelError(
            f"The checkpoints of {run_dir} hold only what was trained, and the model that they were trained from is "
            f"not in {model_dir} any more. Put it back there."
        )
    return Beginning(model_dir, kept["fingerprint"], TrainSpec.from_dict(kept["recipe"]))


def load_checkpoint(directory: Path, *, device: torch.device | str = "cpu") -> Any:
    """Load a checkpoint as the model that the run would have published at that step.

    Args:
        directory: A complete `checkpoint-<step>` in its run's directory.
        device: Where the model goes.

    Raises:
        IntegrityError: The checkpoint is incomplete or damaged, its tensors are not those that train, or the model that
            the run started from is another one now.
        ModelError: That model is gone, or cannot be loaded.
    """
    beginning = read_beginning(directory)
    damage = find_damage(directory)
    if damage is not None:
        raise IntegrityError(
            f"The checkpoint {directory} cannot be used: {damage}. Choose another one of {directory.parent}."
        )
    if beginning.fingerprint is not None and model_fingerprint(beginning.model_dir) != beginning.fingerprint:
        raise IntegrityError(
            f"{directory} holds what was trained of the model in {beginning.model_dir} with the fingerprint "
            f"{beginning.fingerprint}, and another one is there now. Put the model back, or train again."
        )
    model = load_model(beginning.model_dir, dtype=weights_dtype(beginning.spec))
    trainable = freezing.apply(beginning.spec, model)
    saved = load_file(directory / TRAINABLE_FILE)
    require_fit(trainable.model, saved, directory)
    load_trainable(trainable.model, saved)
    merge = getattr(trainable.model, "merge_and_unload", None)
    model = merge() if merge is not None else trainable.model
    cast_weights(model, load_config(beginning.model_dir).dtype or torch.float32)
    model.config.text_config.use_cache = model.config.use_cache = True
    return model.requires_grad_(False).to(device)
