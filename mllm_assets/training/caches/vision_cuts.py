"""Where each family's vision part is cut: the smallest frozen prefix whose output can replace it.

The cut is before the projector, which may train. What is kept of an image is a table with a row for each of its tokens.
While the table replaces pixels, `get_image_features` of the model is replaced, and nothing else of it: `forward` stays
the library's. Gemma 3 keeps that method too: its tower is replaced, and its projector does not pool.

Shape suffixes: K tokens of one image, R tokens of all images, W values of a row, H the tower's hidden size.
A video is as a picture with more steps in time. Not covered: towers that train, in part or whole.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

Inputs = Mapping[str, torch.Tensor]


class VisionCut:
    """The cut of PaliGemma, right after the tower; the others differ as their docstrings say.

    Attributes:
        tower: The module that computes, in `model.model`.
        parts: Its modules that the cache replaces.
        takes_videos: Whether the model has a method for videos that this cut replaces too.
        rounds_pixels_first: Whether pixels are brought to the weights' dtype before anything is computed.
    """

    tower = "vision_tower"
    parts: tuple[str, ...] = ("vision_tower",)
    rounds_pixels_first = True
    takes_videos = False

    def settings(self, config: Any) -> dict[str, Any]:
        """Return what a row depends on in the model's configuration, apart from the tower's own."""
        return {}

    def rows(self, core: Any, inputs: Inputs) -> list[torch.Tensor]:
        """Return rows_KW of each image in order, from what the image processor made."""
        return list(core.vision_tower(inputs["pixel_values"]).last_hidden_state)

    def project(self, core: Any, rows_RW: torch.Tensor) -> BaseModelOutputWithPooling:
        """Return what `get_image_features` returns, from the rows of all images one after another."""
        return BaseModelOutputWithPooling(pooler_output=core.multi_modal_projector(rows_RW))

    def install(self, core: Any) -> None:
        """Let the model take rows instead of pixels."""
        for part in self.parts:
            core.set_submodule(part, nn.Identity())
        core.get_image_features = lambda pixel_values, *_, **__: self.project(core, pixel_values)
        if self.takes_videos:
            core.get_video_features = lambda pixel_values_videos, *_, **__: self.project(core, pixel_values_videos)

    def uninstall(self, core: Any, modules: Mapping[str, nn.Module]) -> None:
        """Put the parts back."""
        for part, module in modules.items():
            core.set_submodule(part, module)
        del core.get_image_features
        if self.takes_videos:
            del core.get_video_features


class CachedTower(nn.Module):
    """Replaces Gemma 3's tower: its input already is the tower's pooled output."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        pooled_NKH = pixel_values.unflatten(0, (-1, self.num_tokens))
        return BaseModelOutputWithPooling(last_hidden_state=pooled_NKH)  # pyright: ignore[reportArgumentType]


class Gemma3Cut(VisionCut):
    """After the projector's average pool: for gemma-3-4b 256 x 1152 values an image instead of 4096 x 1152.

    The pool runs right after the tower's last norm, and has no weights.
    """

    def settings(self, config: Any) -> dict[str, Any]:
        return {"mm_tokens_per_image": config.mm_tokens_per_image}

    def rows(self, core: Any, inputs: Inputs) -> list[torch.Tensor]:
        hidden = core.vision_tower(pixel_values=inputs["pixel_values"]).last_hidden_state
        num_images, _, width = hidden.shape
        side = core.multi_modal_projector.patches_per_image
        grid = hidden.transpose(1, 2).reshape(num_images, width, side, side).contiguous()
        return list(core.multi_modal_projector.avg_pool(grid).flatten(2).transpose(1, 2).contiguous())

    def install(self, core: Any) -> None:
        projector = _active(core.multi_modal_projector)
        core.vision_tower = CachedTower(core.config.mm_tokens_per_image)
        projector.patches_per_image = projector.tokens_per_side
        projector.avg_pool = nn.Identity()

    def uninstall(self, core: Any, modules: Mapping[str, nn.Module]) -> None:
        projector, vision = _active(core.multi_modal_projector), core.config.vision_config
        core.vision_tower = modules["vision_tower"]
        projector.patches_per_image = vision.image_size // vision.patch_size
        projector.avg_pool = nn.AvgPool2d(kernel_size=projector.kernel_size, stride=projector.kernel_size)


class LlavaCut(VisionCut):
    """The selected hidden layers, side by side, without the class token where the model drops it."""

    def settings(self, config: Any) -> dict[str, Any]:
        return {"layer": config.vision_feature_layer, "strategy": config.vision_feature_select_strategy}

    def rows(self, core: Any, inputs: Inputs) -> list[torch.Tensor]:
        layers = core.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        states = core.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        first = 1 if core.config.vision_feature_select_strategy == "default" else 0
        return list(torch.cat([states[layer][:, first:] for layer in layers], dim=-1))

    def project(self, core: Any, rows_RW: torch.Tensor) -> BaseModelOutputWithPooling:
        return _listed(core.multi_modal_projector(rows_RW))


class Gemma4Cut(VisionCut):
    """The tower's output, which is pooled and has no padding."""

    rounds_pixels_first = False  # they are scaled before

    def rows(self, core: Any, inputs: Inputs) -> list[torch.Tensor]:
        positions = inputs["image_position_ids"]
        hidden = core.vision_tower(inputs["pixel_values"], positions).last_hidden_state
        unit = core.config.vision_config.pooling_kernel_size**2
        return list(hidden.split(((positions != -1).all(dim=-1).sum(dim=-1) // unit).tolist()))

    def project(self, core: Any, rows_RW: torch.Tensor) -> BaseModelOutputWithPooling:
        return _listed(core.embed_vision(inputs_embeds=rows_RW))


class QwenCut(VisionCut):
    """Qwen2-VL before its merger, which LLaMA-Factory counts as the projector: the patches of a token side by side."""

    tower = "visual"
    parts = ("visual.patch_embed", "visual.blocks")
    takes_videos = True

    def rows(self, core: Any, inputs: Inputs) -> list[torch.Tensor]:
        grids = inputs["image_grid_thw"]
        hidden = core.visual(inputs["pixel_values"], grid_thw=grids).last_hidden_state
        return list(self._merged(core, hidden).split(self._num_tokens(core, grids)))

    def project(self, core: Any, rows_RW: torch.Tensor) -> BaseModelOutputWithPooling:
        return _listed(core.visual.merger(rows_RW.reshape(len(rows_RW) * self._patches(core), -1)))

    def _patches(self, core: Any) -> int:
        """How many become one token."""
        return core.config.vision_config.spatial_merge_size**2

    def _merged(self, core: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.reshape(len(hidden) // self._patches(core), -1)

    def _num_tokens(self, core: Any, grids: torch.Tensor) -> list[int]:
        return (grids.prod(dim=-1) // self._patches(core)).tolist()


class Qwen2Cut(QwenCut):
    """Qwen2.5-VL: the tower leaves the patches in the order of its windows; the rows are in the image's."""

    def rows(self, core: Any, inputs: Inputs) -> list[torch.Tensor]:
        from transformers.vision_utils import get_vision_window_index

        grids, visual = inputs["image_grid_thw"], core.visual
        hidden = visual(inputs["pixel_values"], grid_thw=grids).last_hidden_state
        order, _ = get_vision_window_index(grids, visual.spatial_merge_size, visual.window_size, visual.patch_size)
        rows_RW = self._merged(core, hidden)[torch.argsort(order).to(hidden.device)]
        return list(rows_RW.split(self._num_tokens(core, grids)))


class Qwen35Cut(QwenCut):
    """Qwen3.5: Qwen3-VL's tower without deepstack layers."""

    parts = ("visual.patch_embed", "visual.pos_embed", "visual.blocks")


class Qwen3Cut(QwenCut):
    """Qwen3-VL before its merger, and after the frozen mergers of the deepstack layers."""

    parts = ("visual.patch_embed", "visual.pos_embed", "visual.blocks", "visual.deepstack_merger_list")

    def rows(self, core: Any, inputs: Inputs) -> list[torch.Tensor]:
        grids = inputs["image_grid_thw"]
        made = core.visual(inputs["pixel_values"], grid_thw=grids)
        rows_RW = torch.cat([self._merged(core, made.last_hidden_state), *made.deepstack_features], dim=-1)
        return list(rows_RW.split(self._num_tokens(core, grids)))

    def project(self, core: Any, rows_RW: torch.Tensor) -> BaseModelOutputWithPooling:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        vision = core.config.vision_config
        width = self._patches(core) * vision.hidden_size
        merged_RW, *deepstack = rows_RW.split(
            [width, *[vision.out_hidden_size] * len(vision.deepstack_visual_indexes)], dim=-1
        )
        projected = core.visual.merger(merged_RW.reshape(-1, vision.hidden_size))
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=(projected,),  # pyright: ignore[reportArgumentType]
            deepstack_features=[(layer,) for layer in deepstack],  # pyright: ignore[reportArgumentType]
        )


class InternVLCut(VisionCut):
    """Before the projector, after the pixel shuffle, which has no weights and puts a token's patches side by side."""

    def settings(self, config: Any) -> dict[str, Any]:
        return {
            "layer": config.vision_feature_layer,
            "strategy": config.vision_feature_select_strategy,
            "downsample_ratio": config.downsample_ratio,
        }

    def rows(self, core: Any, inputs: Inputs) -> list[torch.Tensor]:
        [hidden] = _entering(core.multi_modal_projector, lambda: core.get_image_features(inputs["pixel_values"]))
        return list(hidden)

    def project(self, core: Any, rows_RW: torch.Tensor) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=core.multi_modal_projector(rows_RW)[None])


class SmolVLMCut(VisionCut):
    """After the connector's pixel shuffle, which has no weights and puts a token's patches side by side."""

    tower = "vision_model"
    parts = ("vision_model",)

    def rows(self, core: Any, inputs: Inputs) -> list[torch.Tensor]:
        made: list[Any] = []
        [hidden] = _entering(
            core.connector.modality_projection,
            lambda: made.append(core.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"])),
        )
        return list(hidden.flatten(0, 1).split([len(features) for features in made[0].pooler_output]))

    def project(self, core: Any, rows_RW: torch.Tensor) -> BaseModelOutputWithPooling:
        return _listed(core.connector.modality_projection(rows_RW))


def _entering(module: nn.Module, compute: Callable[[], object]) -> list[torch.Tensor]:
    """Return what a module was given while something was computed."""
    kept: list[torch.Tensor] = []

    def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        kept.append(arguments[0])

    hook = module.register_forward_pre_hook(keep)
    try:
        compute()
    finally:
        hook.remove()
    return kept


def _active(module: Any) -> Any:
    """Return the copy of a module that trains, where PEFT wraps it (`additional_target`)."""
    copies = vars(module)["_modules"].get("modules_to_save")
    return module if copies is None else copies[module.active_adapter]


def _listed(features: torch.Tensor) -> BaseModelOutputWithPooling:
    """Return features as most families do: a list with an image's each, which `forward` concatenates."""
    return BaseModelOutputWithPooling(pooler_output=[features])  # pyright: ignore[reportArgumentType]
