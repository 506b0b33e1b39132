"""What an optimizer keeps of each weight that trains, and where it works.

With 8 bits bitsandbytes keeps AdamW's two means as bytes with a scale for each block of them, and those of small
tensors in 32 bits. Paged ones may be moved to the host's memory where a GPU's is full; here they count as on the GPU.
"""

import importlib.util

import torch
from torch import nn

from mllm_assets.errors import MachineError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.models.quantization import INSTALL

# Copies of what trains that an optimizer keeps, and those that it makes for a moment: the kernels of `foreach` have a
# list of square roots
STATES = {"adamw_torch_fused": 2, "adamw_torch": 2, "adagrad": 1, "rmsprop": 1, "paged_adamw_32bit": 2}
TEMPORARY = {"adamw_torch": 1, "adafactor": 2, "adagrad": 1, "rmsprop": 1}
# bitsandbytes 0.50, `optim/optimizer.py`: `min_8bit_size` and the values that share a scale
MIN_8BIT_SIZE, VALUES_PER_SCALE = 4096, 256


def require_optimizer(spec: TrainSpec, device_kind: str) -> None:
    """Refuse a recipe whose optimizer does not work on this machine.

    Raises:
        MachineError: bitsandbytes is not installed, or does not know the device.
    """
    if not spec.uses_bitsandbytes_optimizer:
        return
    if device_kind not in ("cpu", "cuda"):
        raise MachineError(
            f"optim: {spec.optim} needs a CUDA device or a CPU, and this run is on {device_kind}. "
            "Set optim: adamw_torch_fused."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(
            f"optim: {spec.optim} needs bitsandbytes, which is not installed. Install it ({INSTALL}), or set "
            "optim: adamw_torch_fused."
        )


def optimizer_name(spec: TrainSpec) -> str:
    """What takes the steps: one of `optim`'s, or muon."""
    return "muon" if spec.use_muon else spec.optim


def embeddings(model: nn.Module) -> set[int]:
    """Return the `id` of each embedding's weight, whose states the library keeps in 32 bits."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Do for an optimizer of several groups what the library does for its own."""
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})


def kept_states(optim: str, parameter: torch.Tensor, *, is_embedding: bool) -> list[torch.Tensor]:
    """Return tensors like those that an optimizer keeps of a parameter, with no content, on the parameter's device."""
    if optim == "muon":  # of a matrix its momentum alone
        return [torch.empty_like(parameter) for _ in range(1 if parameter.ndim == 2 and not is_embedding else 2)]
    if "8bit" not in optim:
        return [torch.empty_like(parameter) for _ in range(STATES.get(optim, 0))]
    if is_embedding or parameter.numel() < MIN_8BIT_SIZE:
        return [torch.empty_like(parameter, dtype=torch.float32) for _ in range(2)]
    num_scales = -(-parameter.numel() // VALUES_PER_SCALE)
    means = [torch.empty_like(parameter, dtype=torch.uint8) for _ in range(2)]
    return [*means, *(parameter.new_empty(num_scales, dtype=torch.float32) for _ in range(2))]
