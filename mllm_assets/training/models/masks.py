"""Gemma 3's attention masks as transformers makes them, without its detour for layers with a sliding window.

It makes the mask of these layers through `torch.vmap`: 25 ms of a CPU whatever the size, a fifth of a step of the
demo's model, and again for each token of an answer. It is the other layers' mask within the window.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.gemma3 import modeling_gemma3

NAME = "create_masks_for_vision_model"

by_vmap: Any = getattr(modeling_gemma3, NAME, None)


def install() -> None:
    """Let all Gemma 3 models of this process make their masks so, where transformers has the function."""
    if by_vmap is not None:
        setattr(modeling_gemma3, NAME, masks_within_window)


def masks_within_window(*, block_sequence_ids: torch.Tensor, **places: Any) -> dict[str, Any]:
    """Return a mask for each kind of layer, of the same values; the arguments are those of transformers' function."""
    cache, mask = places["past_key_values"], places["attention_mask"]
    is_plain = mask.ndim == 2 if mask is not None else cache is not None  # without both, rows may be packed
    is_known = is_plain and (cache is None or type(cache) is DynamicCache)
    if places["config"]._attn_implementation != "sdpa" or not is_known:
        return by_vmap(block_sequence_ids=block_sequence_ids, **places)
    full: Any = create_causal_mask(block_sequence_ids=block_sequence_ids, **places)
    num_queries, num_keys = full.shape[2:]
    first_query = first_key = 0
    if cache is not None:
        layer = cache.is_sliding.index(True) if True in cache.is_sliding else 0
        first_query = cache.get_query_offset(layer)
        num_keys, first_key = cache.get_mask_sizes(num_queries, layer)
    keys = torch.arange(first_key, first_key + num_keys, device=full.device)
    queries = torch.arange(first_query, first_query + num_queries, device=full.device)[:, None]
    within = keys > queries - places["config"].sliding_window
    return {"full_attention": full, "sliding_attention": full[..., first_key : first_key + num_keys] & within}
