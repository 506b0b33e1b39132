"""The machine: which device computes, in which precision, and how much memory it has and has used."""

import importlib.util
import os
import platform
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mllm_assets.errors import MachineError, OutOfMemoryError
from mllm_assets.families.family import Family
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.models.cards import card_is_usable, has_nvidia_driver, try_card, why_no_cuda
from mllm_assets.training.models.quantization import Quantization, pick_quantization
from mllm_assets.worker.protocol import local_rank

GIB = 2**30
# "create a primitive" is oneDNN's message when it cannot allocate its scratch memory. The last three are of CUDA's
# libraries, whose memory is not PyTorch's: the first product on a full card fails in `cublasCreate`
NO_MEMORY = (
    "DefaultCPUAllocator", "can't allocate memory", "out of memory", "not enough memory", "create a primitive",
    "STATUS_ALLOC_FAILED", "calling `cublasCreate", "ALLOCATION_FAILED",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What trains: `kind` is cuda, mps or cpu.

    Attributes:
        memory_gib: Its total.
        free_gib: What other processes leave of it, before this one takes any; None where nobody says.
        index: Which of several cards.
    """

    kind: str
    name: str
    driver: str
    memory_gib: float
    free_gib: float | None = None
    index: int = 0

    @property
    def usable_gib(self) -> float:
        """What a run may take: what is free, and all of it where nobody says."""
        return self.memory_gib if self.free_gib is None else min(self.free_gib, self.memory_gib)


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """`weights`: the dtype that frozen weights have; `autocast`: bf16, fp16 or no mixed precision.

    With `quantization`, frozen linear layers have 4 or 8 bits, and `weights` is what they compute in. `attention` is
    transformers' name of another attention than the model's usual one, PyTorch's sdpa.
    """

    weights: torch.dtype
    autocast: str | None
    quantization: Quantization | None = None
    attention: str | None = None

    @property
    def computed(self) -> torch.dtype:
        """What a training step computes products in, and so what is kept of a frozen part's output."""
        if self.autocast is None:
            return self.weights
        return torch.bfloat16 if self.autocast == "bf16" else torch.float16

    def context(self, device_kind: str) -> AbstractContextManager[Any]:
        """Return what a forward pass outside the trainer runs in, so that it computes what a training step does."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device_kind, dtype=self.computed)

    def describe(self) -> str:
        quantized = f", {self.quantization.describe()}" if self.quantization else ""
        attention = f", {self.attention} attention" if self.attention else ""
        return f"{str(self.weights).removeprefix('torch.')}, autocast {self.autocast}{quantized}{attention}"


def pick_device(wanted: str = "auto", *, use_cpu: bool = False, warn: Callable[[str], object] | None = None) -> Device:
    """Choose the device: `auto` takes cuda, then mps, then cpu; the recipe's `use_cpu` wins over `auto`.

    `warn` is told why a card of NVIDIA's is left idle by `auto`.

    Raises:
        MachineError: The machine does not have that device, or it cannot compute. Says which it has.
    """
    if wanted not in ("auto", "cuda", "mps", "cpu"):
        raise MachineError(f"device is {wanted!r}: expected auto, cuda, mps or cpu. Change it in the resource's YAML.")
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = wanted
    if wanted == "auto":
        kind = "cpu" if use_cpu else next(name for name, there in has.items() if there)
    if not has[kind]:
        there = ", ".join(name for name, present in has.items() if present)
        why, cure = "PyTorch sees no Metal device", "Use a Mac with Apple silicon"
        if kind == "cuda":
            why, cure = why_no_cuda()
        raise MachineError(
            f"The device {kind} was asked for, and this machine has only {there}: {why}. {cure}, or set device: auto."
        )
    if kind == "cuda":
        return _own_card()
    if wanted == "auto" and not use_cpu and warn is not None and has_nvidia_driver():
        why, cure = why_no_cuda()
        warn(f"The NVIDIA card of this machine is not used, and the CPU computes: {why}. {cure}.")
    total_gib, free_gib = _main_memory_gib()
    driver = f"torch {torch.__version__}"
    return Device(kind=kind, name=_cpu_name(), driver=driver, memory_gib=total_gib, free_gib=free_gib)


def _own_card() -> Device:
    """The card of this process: each rank of torchrun has its own, and all that follows computes on it.

    Raises:
        MachineError: There are fewer cards than processes, or the card cannot compute.
    """
    index, count = local_rank(), torch.cuda.device_count()
    if index >= count:
        raise MachineError(
            f"Process {index + 1} of this machine has no CUDA device of its own: expected {index + 1} or more, found "
            f"{count}. Set num_processes of the accelerator (MLLM_ASSETS_NUM_PROCESSES, --num-processes) to {count}."
        )
    with card_is_usable(index):
        torch.cuda.set_device(index)
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        try_card(index)
    if getattr(properties, "is_integrated", False):  # its memory is the machine's, which gives back cached files
        free = max(free, min(total, _meminfo_bytes("MemAvailable") or 0))
    return Device(
        kind="cuda",
        name=properties.name,
        driver=f"CUDA {torch.version.cuda}",
        memory_gib=total / GIB,
        free_gib=free / GIB,
        index=index,
    )


def weights_dtype(spec: TrainSpec) -> torch.dtype:
    """Return the dtype of frozen weights while a recipe trains."""
    if spec.fp16:
        return torch.float16
    return torch.bfloat16 if spec.bf16 or spec.pure_bf16 else torch.float32


def pick_precision(spec: TrainSpec, device: Device) -> Precision:
    """Read `bf16`, `fp16` and `pure_bf16` as LLaMA-Factory does: frozen weights in that dtype, the step under autocast.

    Raises:
        MachineError: The device does not support it, or what `quantization_bit` needs is not installed.
    """
    quantization, weights = pick_quantization(spec, device.kind), weights_dtype(spec)
    if spec.fp16 and device.kind != "cuda":
        raise MachineError(
            f"fp16 needs a CUDA device, and this run is on {device.kind}. Set fp16: false or bf16: true."
        )
    if weights == torch.bfloat16 and device.kind == "cuda" and not torch.cuda.is_bf16_supported(False):
        key = "bf16" if spec.bf16 else "pure_bf16"
        raise MachineError(
            f"{device.name} has no bf16 of its own, and emulating it is slower than float32. Set {key}: false, which "
            "trains in float32 and needs twice the memory for weights. fp16: true overflows in some models, Gemma 3 "
            "among them."
        )
    autocast = "fp16" if spec.fp16 else "bf16" if spec.bf16 else None
    attention = pick_attention(spec, device)
    return Precision(weights=weights, autocast=autocast, quantization=quantization, attention=attention)


def notes_on_precision(precision: Precision, family: Family) -> Iterator[str]:
    """What a model's family makes of the precision that a recipe asks for."""
    if precision.computed == torch.float16 and family.overflows_in_fp16:
        yield (
            f"fp16: true overflows in {family.name}: its activations pass 65,504, and its losses are NaN then. Set "
            "bf16: true, or fp16: false on a card without bf16, which trains in float32."
        )


def pick_attention(spec: TrainSpec, device: Device) -> str | None:
    """Read `flash_attn`: transformers' name of what computes attention, None for the model's usual sdpa.

    Raises:
        MachineError: FlashAttention is asked for where it cannot run.
    """
    if spec.flash_attn != "fa2":
        return "eager" if spec.flash_attn == "disabled" else None
    instead = "Set flash_attn: auto, with which PyTorch's sdpa computes the same"
    if device.kind != "cuda":
        raise MachineError(f"flash_attn: fa2 needs a CUDA device, and this run is on {device.kind}. {instead}.")
    if weights_dtype(spec) == torch.float32:
        raise MachineError(f"flash_attn: fa2 computes in 16 bits, and this run in 32. {instead}, or set bf16: true.")
    if importlib.util.find_spec("flash_attn") is None:
        raise MachineError(
            f"flash_attn: fa2 needs the package flash-attn, which is not installed. {instead}, or install it "
            "(pip install flash-attn --no-build-isolation)."
        )
    return "flash_attention_2"


def peak_memory_gib(device: Device) -> float:
    """Return the most memory this process has held: on the GPU, or resident for the CPU."""
    if device.kind == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


@contextmanager
def out_of_memory_is_an_error(where: str, cure: str) -> Iterator[None]:
    """Turn a failed allocation, on the CPU or a GPU, into a message that names the setting.

    Raises:
        OutOfMemoryError: There was not enough memory. Says where and what to change.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own class for CUDA is a RuntimeError
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutOfMemoryError(f"Out of memory {where}: {reason} {cure}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, whatever library says so in whichever class."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in NO_MEMORY)


def _main_memory_gib() -> tuple[float, float | None]:
    """Return what the machine, or the container, has, and how much of it is free, where the kernel says."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _meminfo_bytes("MemAvailable")
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
        if free is not None and used.is_file():
            free = min(free, total - int(used.read_text()) + _page_cache_bytes(group / "memory.stat"))
    return total / GIB, None if free is None else free / GIB


def _meminfo_bytes(name: str) -> int | None:
    """Return a line of /proc/meminfo, which Linux alone has."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _page_cache_bytes(stat: Path) -> int:
    """Return what a container's kernel would give back at once: file pages that nothing has used lately."""
    lines = stat.read_text().splitlines() if stat.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
