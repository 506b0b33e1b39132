"""Whether a run fits, before anything loads.

The estimate counts weights, gradients, two Adam moments, kept activations and supervised logits. It is meant to be
right within a third; it knows nothing of fragmentation, nor of other processes on the device.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mllm_assets.errors import MachineError
from mllm_assets.training.device import GIB, Device, Precision
from mllm_assets.training.freezing import TrainableSet
from mllm_assets.training.model import base_model
from mllm_assets.training.quantization import quantized_weights
from mllm_assets.training.spec import TrainSpec

SAFE_SHARE = 0.8  # of the device's memory that a batch chosen by the estimate may take: it is right within a third
# Values kept per token and layer for the backward pass, in units of hidden and intermediate width, counted in
# Gemma3DecoderLayer with sdpa: four norms' inputs and outputs, q, k, v, attention output, residuals; gate, up, product.
HIDDEN_KEPT = 14
INTERMEDIATE_KEPT = 3
LOSS_BLOCK = 32768  # most of a frozen output layer that is multiplied at once, see `loss.py`


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """In GiB on one device."""

    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    activations_gib: float
    merge_gib: float = 0.0  # the unquantised model, alone, when a quantised run is over

    @property
    def total_gib(self) -> float:
        steps_gib = self.weights_gib + self.gradients_gib + self.optimizer_gib + self.activations_gib
        return max(steps_gib, self.merge_gib)

    def describe(self) -> str:
        return (
            f"about {self.total_gib:.2f} GiB (weights {self.weights_gib:.2f}, gradients and optimizer "
            f"{self.gradients_gib + self.optimizer_gib:.2f}, activations {self.activations_gib:.2f}"
            f"{f'; at the end the unquantised model, {self.merge_gib:.2f}' if self.merge_gib else ''})"
        )


def checkpoints_activations(spec: TrainSpec, device: Device) -> bool:
    """Say whether activations are computed twice to save memory.

    On by default on a GPU as in LLaMA-Factory; off on the CPU, where it costs 31 % for 5 % of the memory (measured).
    """
    return device.kind != "cpu" and not spec.disable_gradient_checkpointing


def estimate(
    trainable: TrainableSet,
    spec: TrainSpec,
    precision: Precision,
    *,
    num_tokens: int,
    num_images: int,
    num_patches: int | None,
    num_supervised: int,
    checkpointed: bool,
    tower_cached: bool,
    merges_here: bool = False,
) -> MemoryEstimate:
    """Estimate one device's peak from the model's shape, which may be on `meta`.

    Args:
        trainable: The model and what trains.
        spec: The recipe.
        precision: Dtypes of weights and step.
        num_tokens: In the longest row, padded.
        num_images: In the row that has most.
        num_patches: What the tower sees of the row that has most; None where every image has as many.
        num_supervised: Supervised tokens in the row that has most.
        checkpointed: Whether activations are computed twice.
        tower_cached: Whether the tower's output comes from the cache, so that the tower is not there.
        merges_here: Whether the device holds the unquantised model at the end, to merge the adapter into it.
    """
    model = trainable.model
    config = model.config
    names = set(trainable.names)
    quantization = precision.quantization
    quantized = quantized_weights(base_model(model)) if quantization else set()
    weights = sum(
        quantization.weight_bytes(p) if quantization and id(p) in quantized else p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if not (tower_cached and any(key in name for key in trainable.family.vision_keys))
    )
    trained = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name in names)
    width = 4 if precision.weights == torch.float32 else 2
    batch = spec.per_device_train_batch_size
    text, vision = config.text_config, config.vision_config
    vision_layers: int = getattr(vision, trainable.family.vision_layers_key)
    kept = _kept(batch * num_tokens, text, text.num_hidden_layers, checkpointed) * width
    patches_per_row: int = num_patches or num_images * (vision.image_size // vision.patch_size) ** 2
    patches = batch * patches_per_row
    if trainable.tower_trains:
        kept += _kept(patches, vision, vision_layers, checkpointed) * width
    elif not tower_cached:
        kept += patches * (HIDDEN_KEPT * vision.hidden_size + INTERMEDIATE_KEPT * vision.intermediate_size) * width
    head_trains = any("embed_tokens" in name or "lm_head" in name for name in names)
    logits = batch * num_supervised * (3 * text.vocab_size if head_trains else LOSS_BLOCK) * 4
    return MemoryEstimate(
        weights_gib=weights / GIB,
        gradients_gib=trained / GIB,
        optimizer_gib=2 * trained / GIB,
        activations_gib=(kept + logits) / GIB,
        merge_gib=sum(p.numel() * p.element_size() for p in model.parameters()) / GIB if merges_here else 0.0,
    )


def largest_micro_batch(
    spec: TrainSpec, device: Device, estimate_for: Callable[[TrainSpec], MemoryEstimate]
) -> TrainSpec:
    """Regroup a step's samples into the largest micro-batch that fits, with as little accumulation as can be.

    The product of `per_device_train_batch_size` and `gradient_accumulation_steps` stays. The loss changes a little
    where rows differ in length: it is a mean of micro-batch means.

    Returns:
        The spec with the new two values; as it was where not even a single row would fit.
    """
    samples = spec.per_device_train_batch_size * spec.gradient_accumulation_steps
    for size in range(samples, 0, -1):
        if samples % size == 0:
            grouped = dataclasses.replace(
                spec, per_device_train_batch_size=size, gradient_accumulation_steps=samples // size
            )
            if estimate_for(grouped).total_gib <= SAFE_SHARE * device.memory_gib:
                return grouped
    return spec


@contextmanager
def out_of_memory_is_an_error(where: str, cure: str) -> Iterator[None]:
    """Turn a failed allocation, on the CPU or a GPU, into a message that names the setting.

    Raises:
        MachineError: There was no room. Says where and what to change.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own class for CUDA is a RuntimeError
        if not _is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MachineError(f"Out of memory {where}: {reason} {cure}") from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The last is what oneDNN says where it cannot have its scratch memory
    signs = ("DefaultCPUAllocator", "can't allocate memory", "out of memory", "not enough memory", "create a primitive")
    return any(sign in str(error) for sign in signs)


def require_memory(needed: MemoryEstimate, device: Device) -> None:
    """Refuse a run that cannot fit.

    Raises:
        MachineError: The estimate is above the device's memory. Says which part is largest and what lowers it.
    """
    if needed.total_gib <= device.memory_gib:
        return
    parts = {
        "activations": (
            needed.activations_gib,
            "Halve per_device_train_batch_size and double gradient_accumulation_steps",
        ),
        "weights": (max(needed.weights_gib, needed.merge_gib), "Set bf16: true"),
        "gradients and optimizer": (
            needed.gradients_gib + needed.optimizer_gib,
            "Train less of the model: finetuning_type: lora, or freeze_language_model: true",
        ),
    }
    largest = max(parts, key=lambda name: parts[name][0])
    shown = ", ".join(f"{name} {gib:.1f}" for name, (gib, _) in parts.items())
    raise MachineError(
        f"The run needs about {needed.total_gib:.1f} GiB ({shown}), and {device.name} ({device.kind}) has "
        f"{device.memory_gib:.1f} GiB. {parts[largest][1]}."
    )


def _kept(num_tokens: int, config: Any, num_layers: int, checkpointed: bool) -> int:
    """Return the number of values that one stack of layers keeps for its backward pass."""
    a_layer = num_tokens * (HIDDEN_KEPT * config.hidden_size + INTERMEDIATE_KEPT * config.intermediate_size)
    if checkpointed:
        return num_tokens * config.hidden_size * num_layers + a_layer
    return a_layer * num_layers
