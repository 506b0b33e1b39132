"""QLoRA: the frozen linear layers in 4 or 8 bits while adapters train on them, as LLaMA-Factory has bitsandbytes do it.

Which layers: every linear one, the vision tower's too, but not the output layer. The base is quantised again from its
own files at each start, so that no checkpoint holds it; the published model is the adapter merged into the unquantised
base, which is what LLaMA-Factory's export does.
Source: llamafactory 0.9.5, `model/model_utils/quantization.py`.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mllm_assets.errors import MachineError
from mllm_assets.recipe.spec import TrainSpec

INSTALL = "pip install -c constraints.txt -e '.[qlora]'"
BLOCK_SIZE = 64  # 4-bit weights that share one scale
SCALES_PER_BLOCK = 256  # scales that share one scale themselves, with double_quantization


def _installed() -> str:
    """Its version; a step that would be quantised is simulated without it too, to say what would fit."""
    try:
        return version("bitsandbytes")
    except PackageNotFoundError:
        return "missing"


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """How frozen linear layers are held: `bits` 4 or 8; `type` (nf4, fp4) and `double` are of 4 bits only."""

    bits: int
    type: str
    double: bool

    def describe(self) -> str:
        """Name everything that decides the quantised values, and the library that computes with them."""
        kind = f"4-bit {self.type}{', double' if self.double else ''}" if self.bits == 4 else "8-bit"
        return f"{kind}, bitsandbytes {_installed()}"

    def notes(self, device_kind: str) -> Iterator[str]:
        """Yield what a user should know before a quantised run starts."""
        yield (
            f"The base has {self.bits} bits in training; at the end the adapter is merged into the unquantised base, "
            "so that the loss of the evaluated and released model differs a little."
        )
        if device_kind == "cpu":
            yield "quantization_bit saves memory on a GPU; on a CPU it works, and each step takes longer than without."

    def config(self, dtype: torch.dtype) -> Any:
        """Return the configuration that `from_pretrained` takes; the layers compute in `dtype`."""
        from transformers import BitsAndBytesConfig

        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_quant_type=self.type,
        )

    def unloadable(self, directory: Path, error: Exception) -> MachineError:
        """What failed may be bitsandbytes: its build fits a CUDA, and a card."""
        reason = " ".join(str(error).split())[:300]
        return MachineError(
            f"The weights in {directory} cannot be loaded in {self.bits} bits ({type(error).__name__}: {reason}). See "
            "what python -m bitsandbytes says of this machine, or delete quantization_bit from the recipe. If it is "
            "the same without, make or download the weights again."
        )

    def weight_bytes(self, weight: torch.Tensor) -> float:
        """Return what a linear layer's weight takes with its scales."""
        if self.bits == 8:
            return weight.numel() + 4 * weight.shape[0]
        scale = 1 + 4 / SCALES_PER_BLOCK if self.double else 4
        return weight.numel() * (1 / 2 + scale / BLOCK_SIZE)


def pick_quantization(spec: TrainSpec, device_kind: str) -> Quantization | None:
    """Read the recipe's quantisation, and check that this machine supports it.

    Raises:
        MachineError: bitsandbytes is not installed, or the device is not one of those tried.
    """
    if spec.quantization_bit is None:
        return None
    if device_kind not in ("cpu", "cuda"):
        raise MachineError(
            f"quantization_bit needs a CUDA device, or a CPU for small models, and this run is on {device_kind}. "
            f"Delete quantization_bit from the recipe, or set device: cpu."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(
            f"quantization_bit: {spec.quantization_bit} needs bitsandbytes, which is not installed. "
            f"Install it ({INSTALL}), or delete quantization_bit from the recipe."
        )
    return Quantization(bits=spec.quantization_bit, type=spec.quantization_type, double=spec.double_quantization)


def quantizing_device(quantization: Quantization | None, device_kind: str) -> str:
    """Return where a model is loaded: a quantised one where it computes, which takes a GPU seconds, and a CPU minutes.

    Each process of several has its own card by then (`training.models.device`). Others are put on the device later.
    """
    if quantization is None or device_kind != "cuda":
        return "cpu"
    return f"cuda:{torch.cuda.current_device()}"


def keep_trainable(model: nn.Module) -> None:
    """Keep a quantised model's layers trainable after it is evaluated on the CPU.

    bitsandbytes 0.50 packs the weights of a layer in `eval` mode for CPUs with AVX512-BF16, and leaves them so: the
    next training step gets no gradient through the layer.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def num_values(parameter: nn.Parameter) -> int:
    """Return how many weights a parameter holds; a byte holds two 4-bit ones."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def quantized_weights(model: Any) -> set[int]:
    """Return the `id` of each weight of an unquantised model, adapters included, that quantisation would take."""
    output = model.get_output_embeddings()
    kept = {id(model.get_input_embeddings().weight), id(output.weight) if output is not None else None}
    weights = (module.weight for module in model.modules() if isinstance(module, nn.Linear))
    return {id(weight) for weight in weights if not weight.requires_grad and id(weight) not in kept}
