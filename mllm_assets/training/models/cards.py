"""CUDA cards that cannot compute: why PyTorch sees none, and what is wrong with one that it sees."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mllm_assets.errors import MachineError, OutOfMemoryError

HIDES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def has_nvidia_driver() -> bool:
    """Whether this machine seems to have a card of NVIDIA's, whatever PyTorch says."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def why_no_cuda() -> tuple[str, str]:
    """Return why PyTorch sees no CUDA device, and what to do."""
    build = f"PyTorch {torch.__version__}"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"{build} is built without CUDA", "Install PyTorch's build for CUDA (pytorch.org/get-started)"
    for name in HIDES:
        value = os.environ.get(name)
        if value is not None and value.strip() in ("", "-1", "none", "void", "NoDevFiles"):
            return f"{name} is {value!r}, which hides all cards", f"Unset {name}, or let it name a card"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # PyTorch's own words: no driver, one too old, a broken one
        reason = _first_sentence(error)
        if "too old" in reason:
            cure = f"Update NVIDIA's driver, or install a PyTorch build for an older CUDA than {torch.version.cuda}"
            return f"{build} needs a newer driver ({reason})", cure
        named = [f"{name} is {value!r}" for name in HIDES if (value := os.environ.get(name)) is not None]
        if named:
            return f"{build} sees no CUDA device ({reason}; {', '.join(named)})", "Let it name a card of nvidia-smi -L"
        return f"{build} sees no CUDA device ({reason})", "See whether nvidia-smi lists the card; restart after updates"
    return f"{build} sees no CUDA device", "See whether nvidia-smi lists the card"


def note_on_idle_cards(num_processes: int) -> str | None:
    """Say that there are more cards than one process computes on."""
    count = torch.cuda.device_count()
    if num_processes >= count:
        return None
    return (
        f"{num_processes} of {count} CUDA devices compute: MLLM_ASSETS_NUM_PROCESSES={count} shares the work, "
        "CUDA_VISIBLE_DEVICES chooses some."
    )


@contextmanager
def card_is_usable(index: int) -> Iterator[None]:
    """Turn what CUDA says of a card when it is first used into a message.

    Raises:
        OutOfMemoryError: Other programs left no memory, not even for CUDA itself.
        MachineError: The card is another program's alone, is broken, or PyTorch has no code for it.
    """
    try:
        yield
    except RuntimeError as error:  # CUDA's own class is one
        reason = _first_sentence(error)
        if "out of memory" in reason:
            raise OutOfMemoryError(
                f"Other programs hold all memory of CUDA device {index} ({reason}). End them (nvidia-smi shows them), "
                "or choose another card with CUDA_VISIBLE_DEVICES."
            ) from error
        if "busy or unavailable" in reason:
            raise MachineError(
                f"CUDA device {index} is another program's alone, or was taken away ({reason}). Wait for that program "
                "(nvidia-smi shows it and the compute mode), or choose another card with CUDA_VISIBLE_DEVICES."
            ) from error
        if "no kernel image" in reason:
            known = ", ".join(torch.cuda.get_arch_list())
            raise MachineError(
                f"{_named(index)}, and PyTorch {torch.__version__} has code for {known} only. Install a PyTorch build "
                "for it (an older card needs one for an older CUDA, pytorch.org/get-started/previous-versions), choose "
                "another card with CUDA_VISIBLE_DEVICES, or set device: cpu."
            ) from error
        raise MachineError(
            f"CUDA device {index} cannot be used: {reason}. See whether nvidia-smi lists it without an error; restart "
            "the machine after an update of the driver, or choose another card with CUDA_VISIBLE_DEVICES."
        ) from error


def try_card(index: int) -> None:
    """Compute something small, which needs memory and code for the card."""
    torch.ones(1, device=f"cuda:{index}").add_(1).item()


def _named(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} has the compute capability {major}.{minor}"


def _first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].split(". ")[0] if lines else type(error).__name__).strip().rstrip(".")
