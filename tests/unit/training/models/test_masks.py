"""The masks of Gemma 3's layers: the same places as transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig
from transformers.cache_utils import DynamicCache
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from mllm_assets.training.models import load, masks

WINDOW = 6
CONFIG = Gemma3TextConfig(
    vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=1,
    num_key_value_heads=1, head_dim=8, sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"], attn_implementation="sdpa",
)  # fmt: skip


def places(length: int, *, padding: int, side: str, cache: Any = None, queries: int | None = None) -> dict[str, Any]:
    """Two rows with two images each, of which the second is longer than the window; the second row is padded."""
    types = torch.zeros(2, length, dtype=torch.long)
    types[:, 2:4] = 1
    types[:, 5:14] = 1
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, slice(0, padding) if side == "left" else slice(length - padding, length)] = 0
    queries = length if queries is None else queries
    return {
        "config": CONFIG,
        "inputs_embeds": torch.zeros(2, queries, 8),
        "attention_mask": mask,
        "past_key_values": cache,
        "position_ids": torch.arange(length - queries, length)[None],
        "block_sequence_ids": get_block_sequence_ids_for_mask(types),
    }


def require_same(asked: dict[str, Any]) -> None:
    expected, found = masks.by_vmap(**asked), masks.masks_within_window(**asked)
    assert expected.keys() == found.keys()
    for kind, mask in expected.items():
        assert mask.shape == found[kind].shape and torch.equal(mask, found[kind]), kind


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_batch_has_the_masks_that_transformers_makes(side: str, padding: int) -> None:
    require_same(places(18, padding=padding, side=side))


@pytest.mark.parametrize("length", [4, 5, 6, 7, 18])
def test_each_token_of_an_answer_has_the_masks_that_transformers_makes(length: int) -> None:
    """Layers with a window keep the last keys only."""
    cache = DynamicCache(config=CONFIG)
    require_same(places(length, padding=2, side="left", cache=cache))
    require_same(places(length, padding=0, side="left", cache=cache) | {"attention_mask": None})
    for layer in range(3):
        cache.update(torch.zeros(2, 1, length, 8), torch.zeros(2, 1, length, 8), layer)
    for more in range(1, 4):
        require_same(places(length + more, padding=2, side="left", cache=cache, queries=1))
        for layer in range(3):
            cache.update(torch.zeros(2, 1, 1, 8), torch.zeros(2, 1, 1, 8), layer)


def test_what_it_does_not_know_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(masks, "by_vmap", lambda **places: asked.append(places) or {})
    masks.masks_within_window(**places(8, padding=0, side="left") | {"attention_mask": None})
    masks.masks_within_window(**places(8, padding=0, side="left", cache=object()))
    assert len(asked) == 2


def test_a_loaded_model_makes_no_mask_by_vmap(monkeypatch: pytest.MonkeyPatch, parity_dir: Path) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a mask was made by vmap")

    monkeypatch.setattr(modeling_gemma3.torch, "vmap", refuse)
    model = load.load_model(parity_dir / "model")
    ids = torch.arange(5, 15)[None]
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        assert model(**asked).logits.isfinite().all()
        assert model.generate(**asked, max_new_tokens=3, do_sample=False).shape[1] > 10
