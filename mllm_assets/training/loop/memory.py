"""Whether a run fits, before anything loads: weights, gradients, optimizer states, activations and logits.

What counts is the memory that other processes leave free.
"""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from mllm_assets.errors import OutOfMemoryError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches.prepare import CachePlan, Setup
from mllm_assets.training.loop.loss import LOSS_BLOCK
from mllm_assets.training.loop.optimizers import embeddings, kept_states, optimizer_name
from mllm_assets.training.loop.simulation import SimulatedStep, simulate
from mllm_assets.training.models.device import GIB, Device
from mllm_assets.training.models.load import base_model
from mllm_assets.training.models.quantization import quantized_weights

SAFE_SHARE = 0.8  # of a CPU's memory that a batch chosen by the count may take, which is right within a third
# On a GPU, reckoned, not yet measured: cuBLAS's and cuDNN's workspaces and kernels that load when they are first used;
# and blocks that PyTorch's allocator holds in sizes that nothing asks for again
WORKSPACE_GIB, FRAGMENTATION = 0.7, 1.05
# Values kept per token and layer for the backward pass, in units of hidden and intermediate width, counted in
# Gemma3DecoderLayer with sdpa: four norms' inputs and outputs, q, k, v, attention output, residuals; gate, up, product.
HIDDEN_KEPT = 14
LOGIT_COPIES = 4  # when a token is drawn: logits, those without some tokens, probabilities, what is sorted or summed
INTERMEDIATE_KEPT = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """In GiB on one device."""

    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    activations_gib: float
    merge_gib: float = 0.0  # only the unquantised model, at the end of a quantised run

    @property
    def total_gib(self) -> float:
        steps_gib = self.weights_gib + self.gradients_gib + self.optimizer_gib + self.activations_gib
        return max(steps_gib, self.merge_gib)

    def on(self, device: Device) -> float:
        """What the device must have free for it: on a GPU also libraries and what the allocator cannot use again."""
        return self.total_gib * FRAGMENTATION + WORKSPACE_GIB if device.kind == "cuda" else self.total_gib

    def fits(self, device: Device) -> bool:
        return self.on(device) <= device.usable_gib

    def describe(self) -> str:
        return (
            f"about {self.total_gib:.2f} GiB (weights {self.weights_gib:.2f}, gradients and optimizer "
            f"{self.gradients_gib + self.optimizer_gib:.2f}, activations {self.activations_gib:.2f}"
            f"{f'; at the end the unquantised model, {self.merge_gib:.2f}' if self.merge_gib else ''})"
        )


def may_checkpoint(spec: TrainSpec, device: Device) -> bool:
    """Return whether activations may be computed twice to save memory.

    Not on the CPU, where it costs 31 % for 5 % of the memory (measured), nor where the recipe turns it off.
    """
    return device.kind != "cpu" and not spec.disable_gradient_checkpointing


def needs_checkpointing(setup: Setup, plan: CachePlan) -> bool:
    """Return whether a run fits only with activations computed twice; LLaMA-Factory always computes them twice."""
    if not may_checkpoint(setup.spec, setup.device):
        return False
    return not estimate(replace(setup, checkpointed=False), plan).fits(setup.device)


def estimate(setup: Setup, plan: CachePlan) -> MemoryEstimate:
    """Estimate one device's peak from the model's shape, before a weight is loaded.

    On a GPU a step is simulated; on the CPU, and where the family's images differ in their numbers of patches, the
    values that a layer keeps are counted, which is right within a third.
    """
    checkpointed = may_checkpoint(setup.spec, setup.device) if setup.checkpointed is None else setup.checkpointed
    counts = not setup.shape.family.is_described or setup.inputs.rows.counted("num_patches").any()
    if setup.device.kind == "cuda" and not counts:
        return _simulated(simulate(setup, plan, checkpointed=checkpointed), setup)
    return _counted(setup, plan, checkpointed=checkpointed)


def _simulated(step: SimulatedStep, setup: Setup) -> MemoryEstimate:
    spreads = setup.num_processes > 1 and not (setup.spec.fsdp or setup.spec.deepspeed)
    activations = max(step.highest - step.weights - step.gradients - step.optimizer, _drawing(setup))
    return MemoryEstimate(
        weights_gib=(step.weights + (step.gradients if _keeps_start(setup.spec) else 0)) / GIB,
        gradients_gib=step.gradients * (2 if spreads else 1) / GIB,  # DDP sends them from buckets of its own
        optimizer_gib=step.optimizer / GIB,
        activations_gib=activations / GIB,
    )


def _counted(setup: Setup, plan: CachePlan, *, checkpointed: bool) -> MemoryEstimate:
    model, family = setup.shape.model, setup.shape.family
    names, rows = set(setup.shape.names), setup.inputs.rows
    quantization = setup.precision.quantization
    quantized = quantized_weights(base_model(model)) if quantization else set()
    weights = sum(
        quantization.weight_bytes(p) if quantization and id(p) in quantized else p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if not (plan.tower and any(key in name for key in family.vision_keys))
    )
    trains = [p for name, p in model.named_parameters() if name in names]
    trained = sum(p.numel() * p.element_size() for p in trains)
    embedded, optim = embeddings(model), optimizer_name(setup.spec)
    states = sum(
        state.nbytes for p in trains for state in kept_states(optim, p.to("meta"), is_embedding=id(p) in embedded)
    )
    width = 4 if setup.precision.weights == torch.float32 else 2
    batch = setup.spec.per_device_train_batch_size * setup.spec.sequences_of_a_row
    num_drawn = setup.spec.max_completion_length if setup.spec.learns_rewards else 0
    text = model.config.get_text_config()
    num_tokens = batch * (int(rows.counted("num_tokens").max()) + num_drawn)
    kept = _kept(num_tokens, text, text.num_hidden_layers, checkpointed) * width
    if family.is_described:  # of others nothing is known of the tower
        kept += _kept_by_tower(setup, plan, batch, checkpointed) * width
    num_supervised = num_drawn or int(rows.counted("num_supervised").max())
    head_trains = any("embed_tokens" in name or "lm_head" in name for name in names)
    logits = batch * num_supervised * (3 * text.vocab_size if head_trains else LOSS_BLOCK) * 4
    merges_here = quantization is not None and setup.device.kind == "cpu"
    return MemoryEstimate(
        weights_gib=(weights + (trained if _keeps_start(setup.spec) else 0)) / GIB,
        gradients_gib=trained / GIB,
        optimizer_gib=states / GIB,
        activations_gib=max(kept + logits, _drawing(setup)) / GIB,
        merge_gib=sum(p.numel() * p.element_size() for p in model.parameters()) / GIB if merges_here else 0.0,
    )


def _keeps_start(spec: TrainSpec) -> bool:
    """Whether what trains is in memory as it began too: the reference of rewarded answers."""
    return spec.learns_rewards and spec.beta > 0


def _drawing(setup: Setup) -> int:
    """The bytes that drawing a batch's answers takes: keys and values of all layers, and logits of a token."""
    spec, text = setup.spec, base_model(setup.shape.model).config.get_text_config()
    if not spec.learns_rewards:
        return 0
    num_rows = spec.per_device_train_batch_size * spec.num_generations
    num_tokens = num_rows * (int(setup.inputs.rows.counted("num_tokens").max()) + spec.max_completion_length)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kept = num_tokens * text.num_hidden_layers * 2 * text.num_key_value_heads * head_dim * 4
    return kept + LOGIT_COPIES * num_rows * text.vocab_size * 4


def _kept_by_tower(setup: Setup, plan: CachePlan, batch: int, checkpointed: bool) -> int:
    """The values that the vision tower keeps of a batch."""
    rows, vision = setup.inputs.rows, setup.shape.model.config.vision_config
    # what the tower sees of a row; families whose images all have as many patches do not count them
    patches = batch * (
        int(rows.counted("num_patches").max())
        or int((rows.counted("images") + rows.counted("num_crops")).max())
        * (vision.image_size // vision.patch_size) ** 2
    )
    if setup.shape.tower_trains:
        num_layers = getattr(vision, setup.shape.family.vision_layers_key)
        return _kept(patches, vision, num_layers, checkpointed)
    if plan.tower:
        return 0
    return _kept(patches, vision, 1, False)


def publishing_device(setup: Setup, dtype: torch.dtype, *, num_rows: int) -> str:
    """Return where a model that is loaded again to be published is merged and compared.

    On the card where what training left of it holds the model and the logits of `num_rows` rows, or in main memory.
    """
    device, config = setup.device, base_model(setup.shape.model).config
    if device.kind != "cuda":
        return "cpu"
    gc.collect()
    torch.cuda.empty_cache()
    num_tokens = max(len(row.input_ids) for row in setup.inputs.rows)
    logits = 3 * num_rows * num_tokens * config.get_text_config().vocab_size * 4  # float32, and what a loss makes of it
    needed = MemoryEstimate(
        weights_gib=setup.shape.num_params * dtype.itemsize / GIB,
        gradients_gib=0.0,
        optimizer_gib=0.0,
        activations_gib=logits / GIB,
    )
    free_gib = torch.cuda.mem_get_info(device.index)[0] / GIB
    return f"cuda:{device.index}" if needed.fits(replace(device, free_gib=free_gib)) else "cpu"


def largest_micro_batch(
    spec: TrainSpec, device: Device, estimate_for: Callable[[TrainSpec], MemoryEstimate]
) -> TrainSpec:
    """Regroup a step's samples into the largest micro-batch that fits, with as little accumulation as possible.

    The product of `per_device_train_batch_size` and `gradient_accumulation_steps` stays. The loss changes a little
    if rows differ in length: it is a mean of micro-batch means. Unchanged if not even a single row would fit.
    """
    samples = spec.per_device_train_batch_size * spec.gradient_accumulation_steps
    small = [size for size in range(1, math.isqrt(samples) + 1) if samples % size == 0]
    sizes = sorted({*small, *(samples // size for size in small)}, reverse=True)
    while sizes:  # half as many estimates as sizes, or fewer: each may take seconds
        size = sizes.pop(0)
        grouped = replace(spec, per_device_train_batch_size=size, gradient_accumulation_steps=samples // size)
        needed = estimate_for(grouped)
        if needed.on(device) <= (device.usable_gib if device.kind == "cuda" else SAFE_SHARE * device.usable_gib):
            return grouped
        if device.kind == "cuda":  # activations grow with the batch, so at least these sizes are too large as well
            held = needed.total_gib - needed.activations_gib
            room = device.usable_gib - WORKSPACE_GIB - held * FRAGMENTATION
            most = size * room / (needed.activations_gib * FRAGMENTATION) * 1.1
            sizes = [other for other in sizes if other <= most]
    return spec


def require_memory(needed: MemoryEstimate, device: Device, find_cure: Callable[[], str | None]) -> None:
    """Refuse a run that does not fit.

    Raises:
        MachineError: The estimate is above the device's memory. Says how it is made up, and what would fit.
    """
    if needed.fits(device):
        return
    parts = {
        "activations": needed.activations_gib,
        "weights": max(needed.weights_gib, needed.merge_gib),
        "gradients and optimizer": needed.gradients_gib + needed.optimizer_gib,
    }
    shown = ", ".join(f"{name} {gib:.1f}" for name, gib in parts.items())
    if device.kind == "cuda":
        shown += f", workspaces and fragmentation {needed.on(device) - needed.total_gib:.1f}"
    has = f"{device.memory_gib:.1f} GiB"
    if device.usable_gib < device.memory_gib:
        has = f"{device.usable_gib:.1f} GiB of {has} free"
    cure = find_cure() or "No change of the recipe makes it fit: take a smaller model, or a device with more memory"
    if needed.on(device) <= device.memory_gib:
        other = ", choose another card with CUDA_VISIBLE_DEVICES" if device.kind == "cuda" else ""
        cure = f"End other programs on it (nvidia-smi or top shows them){other}, or: {cure}"
    raise OutOfMemoryError(
        f"The run needs about {needed.on(device):.1f} GiB ({shown}), and {device.name} ({device.kind}) has "
        f"{has}. {cure}."
    )


def _kept(num_tokens: int, config: Any, num_layers: int, checkpointed: bool) -> int:
    """Return the number of values that one stack of layers keeps for its backward pass."""
    hidden = getattr(config, "embed_dim", config.hidden_size)  # Qwen2-VL names the output the other
    intermediate = getattr(config, "intermediate_size", 4 * hidden)
    a_layer = num_tokens * (HIDDEN_KEPT * hidden + INTERMEDIATE_KEPT * intermediate)
    if checkpointed:
        return num_tokens * hidden * num_layers + a_layer
    return a_layer * num_layers
