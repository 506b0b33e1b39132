"""The frozen vision tower, and what replaces it when its output is cached.

`vision_cuts.py` defines where a family's tower is cut, and what is kept of an image.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import PIL
import tokenizers
import torch
import transformers
from torch import nn

from mllm_assets.artifacts import digest_json
from mllm_assets.errors import RecipeError
from mllm_assets.families.family import Family, family_of
from mllm_assets.plugins import resolve
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches.vision_cuts import VisionCut
from mllm_assets.training.encoding.collate import NUM_CROPS
from mllm_assets.training.encoding.visual_tokens import image_slots, video_slots
from mllm_assets.training.models.device import Precision


def cut_of(model: Any) -> VisionCut:
    """Return where the model's vision part is cut.

    Raises:
        RecipeError: Its family has no `vision_cut`.
    """
    family = family_of(model.config.model_type)
    if family.vision_cut is None:
        raise RecipeError(f"Vision features of {family.name} are not cached. Set feature_cache: false for the recipe.")
    return resolve(family.vision_cut)()


def paths(model: Any) -> list[str]:
    """Return the paths in the model of the modules that the cache replaces."""
    return [f"model.{part}" for part in cut_of(model).parts]


def move(model: Any, device: torch.device | str) -> None:
    """Move the complete tower, more than the parts that the cache replaces."""
    model.model.get_submodule(cut_of(model).tower).to(device)


def device_of(model: Any) -> torch.device:
    """Return where the tower is."""
    return next(model.model.get_submodule(cut_of(model).tower).parameters()).device


def tower_has_dropout(config: Any) -> bool:
    """Return whether the tower's output differs from step to step although it is frozen."""
    return (config.vision_config.to_dict().get("attention_dropout") or 0.0) > 0


def tower_fingerprint(model: Any, processor: Any, spec: TrainSpec, precision: Precision, device_kind: str) -> str:
    """Digest everything that a feature depends on except the image.

    Weights, processing, precision, versions, and the kind of device: its autocast rounds in other places.
    """
    cut = cut_of(model)
    return digest_json(
        {
            "family": model.config.model_type,
            "weights": {part: weight_digests(model.model.get_submodule(part)) for part in cut.parts},
            "config": model.config.vision_config.to_dict(),
            "settings": cut.settings(model.config),
            "images": image_processing(processor, spec),
            "precision": precision.describe(),
            "stored": str(precision.computed),
            "device": device_kind,
            "versions": library_versions(),
        }
    )[:16]


def weight_digests(module: nn.Module) -> dict[str, str]:
    """Return sha256 over dtype and bytes of each tensor of a module, by name."""
    return {name: _tensor_digest(tensor) for name, tensor in sorted(module.state_dict().items())}


def image_processing(processor: Any, spec: TrainSpec) -> list[Any]:
    """Return what turns a file into pixels."""
    settings = [processor.image_processor.to_dict(), spec.image_max_pixels, spec.image_min_pixels]
    if told := dict(image_slots(processor, spec.turns).processing):
        settings.append(told)
    if (videos := video_slots(processor)) is not None:
        settings.append([videos.describe(), asdict(spec.turns.videos)])
    return settings


def library_versions() -> list[str]:
    """Return the versions of what computes: another one may give other last bits."""
    return [torch.__version__, transformers.__version__, tokenizers.__version__, PIL.__version__]


@torch.no_grad()
def image_rows(model: Any, inputs: Mapping[str, torch.Tensor], precision: Precision) -> list[torch.Tensor]:
    """Return what is kept of each image as a training step would compute it: a row for each of its tokens.

    `inputs` come from `Collator.tower_inputs`. The rows are in the dtype that the step multiplies in: CUDA's autocast
    returns float32 from a layer norm, which the next product rounds again.
    """
    device = device_of(model)
    with precision.context(device.type):
        rows = cut_of(model).rows(model.model, {name: tensor.to(device) for name, tensor in inputs.items()})
    if NUM_CROPS in inputs:  # an image's tokens are those of its parts too
        seen = iter(rows)
        rows = [torch.cat([next(seen) for _ in range(1 + count)]) for count in inputs[NUM_CROPS].tolist()]
    return [rows_KW.to(precision.computed) for rows_KW in rows]


def require_frozen(names: Sequence[str], family: Family) -> None:
    """Refuse a cache if the tower's output changes at every step.

    Raises:
        RecipeError: A parameter of the tower is among the names of what trains.
    """
    trained = [name for name in names if any(key in name for key in family.vision_keys)]
    if trained:
        raise RecipeError(
            f"Cached vision features cannot replace a tower that trains ({len(trained)} parameters, such as "
            f"{trained[0]}). Set freeze_vision_tower: true or train without the cache."
        )


def install(model: Any) -> dict[str, nn.Module]:
    """Replace the tower by the cache, and return its modules by path, for `uninstall`."""
    replaced = {path: model.get_submodule(path) for path in paths(model)}
    cut_of(model).install(model.model)
    return replaced


def uninstall(model: Any, replaced: Mapping[str, nn.Module]) -> None:
    """Put the modules back that `install` returned."""
    cut_of(model).uninstall(model.model, {path.removeprefix("model."): module for path, module in replaced.items()})


def _tensor_digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(str(tensor.dtype).encode())
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
