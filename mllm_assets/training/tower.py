"""The frozen vision tower, and the module that stands in its place when its output is cached.

The projector begins with an average pool over the tower's output, so the smallest thing to keep is the pooled output:
for gemma-3-4b 256 x 1152 values an image in place of 4096 x 1152. While training, a module that hands these rows on
stands in the tower's place and the projector's pool becomes the identity; `forward` stays the library's.

Shape suffixes: N images, K image tokens, H the tower's hidden size, C H W pixels.
Not covered: towers that train, in part or whole (refused); pan-and-scan crops.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import PIL
import tokenizers
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm_assets.artifacts import digest_json
from mllm_assets.errors import RecipeError
from mllm_assets.training.memory import Precision
from mllm_assets.training.spec import TrainSpec

TOWER = "model.vision_tower"


class CachedTower(nn.Module):
    """Stands in the vision tower's place: its input already is the tower's pooled output."""

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values)  # pyright: ignore[reportArgumentType]


def tower_is_random(config: Any) -> bool:
    """Say whether the tower's output differs from step to step although it is frozen."""
    return config.vision_config.attention_dropout > 0


def tower_fingerprint(model: Any, processor: Any, spec: TrainSpec, precision: Precision) -> str:
    """Digest all that a feature depends on but the image: weights, processing, precision, versions (16 hex)."""
    tower = model.model.vision_tower
    return digest_json(
        {
            "weights": weight_digests(tower),
            "config": tower.config.to_dict(),
            "mm_tokens_per_image": model.config.mm_tokens_per_image,
            "images": image_processing(processor, spec),
            "precision": precision.describe(),
            "versions": library_versions(),
        }
    )[:16]


def weight_digests(module: nn.Module) -> dict[str, str]:
    """Return sha256 over dtype and bytes of each tensor of a module, by name."""
    return {name: _tensor_digest(tensor) for name, tensor in sorted(module.state_dict().items())}


def image_processing(processor: Any, spec: TrainSpec) -> list[Any]:
    """Return what turns a file into pixels."""
    return [processor.image_processor.to_dict(), spec.image_max_pixels, spec.image_min_pixels]


def library_versions() -> list[str]:
    """Return the versions of what computes: another one may give other last bits."""
    return [torch.__version__, transformers.__version__, tokenizers.__version__, PIL.__version__]


@torch.no_grad()
def pooled_output(model: Any, pixel_values_NCHW: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Return what the projector's pool makes of the tower's output in a training step: features_NKH."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    device = tower.post_layernorm.weight.device
    with precision.context(device.type):
        hidden = tower(pixel_values=pixel_values_NCHW.to(device)).last_hidden_state
        num_images, _, width = hidden.shape
        side = projector.patches_per_image
        grid = hidden.transpose(1, 2).reshape(num_images, width, side, side).contiguous()
        return projector.avg_pool(grid).flatten(2).transpose(1, 2).contiguous()


def require_frozen(names: Sequence[str]) -> None:
    """Refuse a cache where the tower's output changes at every step.

    Raises:
        RecipeError: A parameter of the tower is among the names of what trains.
    """
    trained = [name for name in names if "vision_tower" in name]
    if trained:
        raise RecipeError(
            f"Cached vision features cannot stand in for a tower that trains ({len(trained)} parameters, such as "
            f"{trained[0]}). Set freeze_vision_tower: true or train without the cache."
        )


def install(model: Any) -> nn.Module:
    """Put the cache in the tower's place and return the tower, for `uninstall`."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    model.model.vision_tower = CachedTower()
    projector.patches_per_image = projector.tokens_per_side
    projector.avg_pool = nn.Identity()
    return tower


def uninstall(model: Any, tower: nn.Module) -> None:
    """Put the tower back, as `install` found it."""
    projector = model.model.multi_modal_projector
    model.model.vision_tower = tower
    projector.patches_per_image = model.config.vision_config.image_size // model.config.vision_config.patch_size
    projector.avg_pool = nn.AvgPool2d(kernel_size=projector.kernel_size, stride=projector.kernel_size)


def _tensor_digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(str(tensor.dtype).encode())
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
