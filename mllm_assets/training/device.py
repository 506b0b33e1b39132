"""The machine: which device computes, in which precision, and how much memory it has and took."""

import os
import platform
import resource
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mllm_assets.errors import MachineError
from mllm_assets.training.quantization import Quantization, pick_quantization
from mllm_assets.training.spec import TrainSpec

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What trains: `kind` is cuda, mps or cpu; `memory_gib` is all it has."""

    kind: str
    name: str
    driver: str
    memory_gib: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """`weights`: the dtype that frozen weights have; `autocast`: bf16, fp16 or no mixed precision.

    With `quantization`, frozen linear layers have 4 or 8 bits, and `weights` is what they compute in.
    """

    weights: torch.dtype
    autocast: str | None
    quantization: Quantization | None = None

    def context(self, device_kind: str) -> AbstractContextManager[Any]:
        """Return what a forward pass outside the trainer runs in, so that it computes what a training step does."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device_kind, dtype=torch.bfloat16 if self.autocast == "bf16" else torch.float16)

    def describe(self) -> str:
        quantized = f", {self.quantization.describe()}" if self.quantization else ""
        return f"{str(self.weights).removeprefix('torch.')}, autocast {self.autocast}{quantized}"


def pick_device(wanted: str = "auto", *, use_cpu: bool = False) -> Device:
    """Choose the device: `auto` takes cuda, then mps, then cpu; the recipe's `use_cpu` wins over `auto`.

    Raises:
        MachineError: What was asked for is not there. Says what this machine has.
    """
    if wanted not in ("auto", "cuda", "mps", "cpu"):
        raise MachineError(f"device is {wanted!r}: expected auto, cuda, mps or cpu. Change it in the resource's YAML.")
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = wanted
    if wanted == "auto":
        kind = "cpu" if use_cpu else next(name for name, there in has.items() if there)
    if not has[kind]:
        there = ", ".join(name for name, present in has.items() if present)
        build = f"PyTorch {torch.__version__} sees no CUDA device" if kind == "cuda" else "PyTorch sees no Metal device"
        raise MachineError(
            f"The device {kind} was asked for, and this machine has only {there}: {build}. "
            f"Install its driver and a PyTorch build for it, or set device: auto."
        )
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        driver = f"CUDA {torch.version.cuda}"
        return Device(kind="cuda", name=properties.name, driver=driver, memory_gib=properties.total_memory / GIB)
    return Device(kind=kind, name=_cpu_name(), driver=f"torch {torch.__version__}", memory_gib=_main_memory_gib())


def weights_dtype(spec: TrainSpec) -> torch.dtype:
    """The dtype that frozen weights have while a recipe trains."""
    if spec.fp16:
        return torch.float16
    return torch.bfloat16 if spec.bf16 or spec.pure_bf16 else torch.float32


def pick_precision(spec: TrainSpec, device: Device) -> Precision:
    """Read `bf16`, `fp16` and `pure_bf16` as LLaMA-Factory does: frozen weights in that dtype, the step under autocast.

    Raises:
        MachineError: The device cannot do it, or what `quantization_bit` needs is not installed.
    """
    quantization = pick_quantization(spec, device.kind)
    if spec.fp16:
        if device.kind != "cuda":
            raise MachineError(
                f"fp16 needs a CUDA device, and this run is on {device.kind}. Set fp16: false or bf16: true."
            )
        return Precision(weights=weights_dtype(spec), autocast="fp16", quantization=quantization)
    if spec.bf16 or spec.pure_bf16:
        if device.kind == "cuda" and not torch.cuda.is_bf16_supported():
            raise MachineError(f"{device.name} has no bf16. Set bf16: false and fp16: true.")
        autocast = "bf16" if spec.bf16 else None
        return Precision(weights=weights_dtype(spec), autocast=autocast, quantization=quantization)
    return Precision(weights=weights_dtype(spec), autocast=None, quantization=quantization)


def peak_memory_gib(device: Device) -> float:
    """Return the most memory this process has held: on the GPU, or resident for the CPU."""
    if device.kind == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def _main_memory_gib() -> float:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total / GIB


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
