"""How many rows a GPU is asked about at once: what they would take is seen on fake tensors first."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves

from mllm_assets.inference.answerer import Answerer, token_losses
from mllm_assets.training.caches import tower
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.loop.memory import MemoryEstimate
from mllm_assets.training.loop.simulation import LiveBytes, cuda_rules, to_fake
from mllm_assets.training.models.device import GIB, Device
from mllm_assets.training.models.load import base_model, model_on_meta, with_pixels_as, without_waiting_checks
from mllm_assets.worker.tasks import ROWS_AT_ONCE

ON_A_GPU = (64, 32)  # the first that fits is taken


def rows_at_once(answerer: Answerer, rows: EncodedRows, device: Device, *, num_new_tokens: int | None = None) -> int:
    """Return how many rows to score at once, or with `num_new_tokens` to answer.

    More than usual on a GPU whose free memory holds them, each as large as the largest. Families whose `forward` reads
    values of its inputs, as Qwen's grids of patches, cannot be seen on fake tensors; of those that are not described
    here nobody knows.
    """
    if device.kind != "cuda" or len(rows) <= ROWS_AT_ONCE or rows.counted("num_patches").any():
        return ROWS_AT_ONCE
    if not answerer.collator.family.is_described:
        return ROWS_AT_ONCE
    model = answerer.model
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    for size in ON_A_GPU:
        try:
            taken = bytes_of(answerer, rows, min(size, len(rows)), num_new_tokens=num_new_tokens)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return ROWS_AT_ONCE
        needed = MemoryEstimate(
            weights_gib=held / GIB, gradients_gib=0.0, optimizer_gib=0.0, activations_gib=taken / GIB
        )
        if needed.fits(device):
            return size
    return ROWS_AT_ONCE


def bytes_of(answerer: Answerer, rows: EncodedRows, num_rows: int, *, num_new_tokens: int | None = None) -> int:
    """Return the most bytes that `num_rows` rows take at once beside the weights."""
    core = base_model(answerer.model)
    shape = model_on_meta(copy.deepcopy(core.config), dtype=core.dtype)
    if answerer.collator.features is not None:
        tower.install(shape)
    batch = _largest(answerer, rows, asks=num_new_tokens is not None)
    batch = with_pixels_as(batch, core.dtype)
    with cuda_rules(), torch.no_grad(), without_waiting_checks():
        to_fake(shape.eval())
        memory = LiveBytes()
        memory.add([*shape.parameters(), *shape.buffers()])
        weights = memory.now
        fake = {name: torch.empty(num_rows * len(t), *t.shape[1:], dtype=t.dtype) for name, t in batch.items()}
        memory.add(fake)
        with memory:
            if num_new_tokens is None:
                token_losses(shape, fake)
                return memory.highest - weights
            grown = _prefilled(shape, fake) * num_new_tokens / fake["input_ids"].shape[1]
    return memory.highest - weights + int(grown)


def _prefilled(shape: Any, batch: Mapping[str, torch.Tensor]) -> int:
    """Do the first step of an answer, and return the bytes of keys and values that it keeps."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "shift_labels")}
    found = shape(**{**inputs, "use_cache": True, "logits_to_keep": 1})
    found.logits.float()
    kept = [value for layer in found.past_key_values.layers for value in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(kept))


def _largest(answerer: Answerer, rows: EncodedRows, *, asks: bool) -> dict[str, torch.Tensor]:
    """A batch of the longest row, with as many supervised tokens as any has."""
    longest = rows[int(rows.counted("num_tokens").argmax())]
    batch = (answerer.asking_collator if asks else answerer.collator)([longest])
    if "shift_labels" in batch:
        most = int(rows.counted("num_supervised").max())
        batch |= {name: torch.zeros(1, most, dtype=torch.long) for name in ("logits_to_keep", "shift_labels")}
    return batch
