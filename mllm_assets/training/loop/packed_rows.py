"""Packed rows that do not see each other: the masks, and the positions, that a family's model wants for it.

What a batch says of its rows are their `position_ids`, which are 0 at each row's first token; padding, all 0, is rows
of one token. Shape suffixes: B sequences, T tokens.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from mllm_assets.families.family import FAMILIES
from mllm_assets.plugins import resolve

Masks = torch.Tensor | dict[str, torch.Tensor]


def rows_apart(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return what keeps the rows of a batch without a mask from seeing each other, and gives each its own positions."""
    family, config = FAMILIES[model.config.model_type], model.config
    apart = {"attention_mask": resolve(str(family.packed_masks))(inputs, config.get_text_config())}
    if family.packed_positions is not None:
        apart["position_ids"] = resolve(family.packed_positions)(model.model, inputs)
    return apart


def causal_masks(inputs: Mapping[str, torch.Tensor], text_config: Any) -> Masks:
    """Return the mask (B, 1, T, T), true where a token is seen: those of its row before it, and itself.

    Where a model has layers with a sliding window, one of each kind of layer.
    """
    seen, distance = _seen(inputs)
    if "sliding_attention" not in (getattr(text_config, "layer_types", None) or ()):
        return seen
    return {"full_attention": seen, "sliding_attention": seen & (distance < text_config.sliding_window)}


def gemma3_masks(inputs: Mapping[str, torch.Tensor], text_config: Any) -> Masks:
    """Return both kinds of Gemma 3's masks: image tokens, of type 1, see all of their image."""
    seen, distance = _seen(inputs, _same_image(inputs["token_type_ids"]))
    return {"full_attention": seen, "sliding_attention": seen & (distance < text_config.sliding_window)}


def gemma4_masks(inputs: Mapping[str, torch.Tensor], text_config: Any) -> Masks:
    """Return both kinds of Gemma 4's masks: images are seen in both directions in layers with a window alone."""
    in_both = getattr(text_config, "use_bidirectional_attention", None) == "vision"
    seen, distance = _seen(inputs, _same_image(inputs["mm_token_type_ids"]) if in_both else None)
    return {
        "full_attention": seen & (distance >= 0),
        "sliding_attention": seen & (distance < text_config.sliding_window),
    }


def grid_positions(core: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return Qwen's positions (3, B, T), of time, height and width, of each row as if it were alone.

    Args:
        core: The model inside, which makes the positions of a row with pictures.
        inputs: Of a batch, with `mm_token_type_ids`.
    """
    positions_3BT = inputs["position_ids"].expand(3, -1, -1).clone()
    grids_N3 = inputs.get("image_grid_thw")
    if grids_N3 is None:
        return positions_3BT
    merged = core.config.vision_config.spatial_merge_size**2
    num_tokens = (grids_N3.prod(-1) // merged).tolist()
    begins_BT, types_BT = inputs["position_ids"] == 0, inputs["mm_token_type_ids"]
    first = 0
    for at, begins in enumerate(begins_BT.tolist()):
        bounds = [place for place, is_begin in enumerate(begins) if is_begin] + [len(begins)]
        for begin, end in pairwise(bounds):
            left = int(types_BT[at, begin:end].sum())
            if end - begin == 1 or not left:  # padding, or a row without pictures
                continue
            last = first
            while left > 0:
                left -= num_tokens[last]
                last += 1
            of_row, _ = core.get_rope_index(
                inputs["input_ids"][at : at + 1, begin:end],
                mm_token_type_ids=types_BT[at : at + 1, begin:end],
                image_grid_thw=grids_N3[first:last],
            )
            positions_3BT[:, at, begin:end] = of_row[:, 0]
            first = last
    return positions_3BT


def _seen(inputs: Mapping[str, torch.Tensor], also: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask (B, 1, T, T) of what is seen in a row, before a token or `also`; and how far before it (T, T)."""
    row_BT = (inputs["position_ids"] == 0).cumsum(-1)
    places = torch.arange(row_BT.shape[1], device=row_BT.device)
    distance = places[:, None] - places[None, :]
    seen = distance >= 0 if also is None else (distance >= 0) | also
    return ((row_BT[:, :, None] == row_BT[:, None, :]) & seen)[:, None], distance


def _same_image(types_BT: torch.Tensor) -> torch.Tensor:
    is_image_BT = types_BT == 1
    begins_BT = is_image_BT & ~torch.nn.functional.pad(is_image_BT, (1, 0))[:, :-1]
    image_BT = torch.where(is_image_BT, begins_BT.cumsum(-1), 0)
    return (image_BT[:, :, None] == image_BT[:, None, :]) & is_image_BT[:, :, None]
