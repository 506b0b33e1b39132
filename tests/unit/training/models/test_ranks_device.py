"""Each rank has a card of its own, and is told what is free on it, or why it cannot compute."""

import re
from types import SimpleNamespace

import pytest
import torch

from mllm_assets.errors import MachineError
from mllm_assets.training.models.cards import HIDES, note_on_idle_cards
from mllm_assets.training.models.device import GIB, pick_device, pick_precision
from tests.unit.training.loop.test_machine import make_spec


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two cards of 80 GiB, 10 and 70 of them free; holds the card that computes."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: current.__setitem__(0, index))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name=f"card {index}"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((10, 70)[index] * GIB, 80 * GIB))
    monkeypatch.setattr("mllm_assets.training.models.device.try_card", lambda index: None)
    return current


@pytest.mark.parametrize(("rank", "free_gib"), [(None, 10), (0, 10), (1, 70)])
def test_a_rank_computes_on_its_own_card_and_counts_what_is_free_there(
    cards: list[int], monkeypatch: pytest.MonkeyPatch, rank: int | None, free_gib: float
) -> None:
    """All ranks made their share of the caches on card 0, and took its total for what they may use."""
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", str(rank))
    device = pick_device("cuda")
    assert cards == [rank or 0] == [device.index]
    assert (device.name, device.memory_gib, device.usable_gib) == (f"card {rank or 0}", 80, free_gib)


def test_memory_that_a_card_shares_with_the_machine_is_free_where_files_are_cached_in_it(
    cards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA does not count what the kernel would give back: after a model was read nothing seemed to fit."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="x", is_integrated=True))
    monkeypatch.setattr("mllm_assets.training.models.device._meminfo_bytes", lambda name: 100 * GIB)
    assert pick_device("cuda").usable_gib == 80


def test_cards_that_are_left_idle_are_told(cards: list[int]) -> None:
    """Nobody who has two learnt that one of them computed."""
    assert str(note_on_idle_cards(1)).startswith("1 of 2 CUDA devices compute: MLLM_ASSETS_NUM_PROCESSES=2 shares")
    assert note_on_idle_cards(2) is None


def test_more_processes_than_cards_are_refused(cards: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MachineError, match=r"expected 3 or more, found 2\. Set num_processes .* to 2\."):
        pick_device("cuda")


def test_bf16_that_is_emulated_is_refused_and_float32_advised(
    cards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cards before Ampere pass torch's own question, and Gemma 3 overflows in the fp16 that was advised."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(MachineError, match=r"no bf16 of its own.* Set bf16: false, which trains in float32"):
        pick_precision(make_spec(bf16=True), pick_device("cuda"))


@pytest.mark.parametrize(("said", "told"), [
    ("CUDA error: out of memory\nCUDA kernel errors might", r"^Other programs hold all memory of CUDA device 0 .*CUD"),
    ("CUDA error: all CUDA-capable devices are busy or unavailable", r"another program's alone.* Wait for that prog"),
    ("CUDA error: no kernel image is available for execution on the device",
     r"^a V100 has the compute capability 7\.0, and PyTorch .* has code for sm_75, sm_90 only\. Install a PyTorch"),
    ("CUDA error: uncorrectable ECC error encountered", r"device 0 cannot be used: CUDA error: uncorrectable .*\. See"),
])  # fmt: skip
def test_what_cuda_says_of_a_card_that_cannot_compute_is_told_with_what_to_do(
    cards: list[int], monkeypatch: pytest.MonkeyPatch, said: str, told: str
) -> None:
    """A traceback, and where PyTorch had no code for the card only after the model was loaded."""

    def fail(index: int) -> None:
        raise torch.AcceleratorError(said)

    monkeypatch.setattr("mllm_assets.training.models.device.try_card", fail)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    with pytest.raises(MachineError, match=told):
        pick_device("cuda")


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by"


@pytest.mark.parametrize(("built_for", "visible", "said", "told"), [
    (None, None, "", r"is built without CUDA\. Install PyTorch's build for CUDA"),
    ("13.0", "-1", "", r"CUDA_VISIBLE_DEVICES is '-1', which hides all cards\. Unset CUDA_VISIBLE_DEVICES"),
    ("13.0", None, TOO_OLD, r"needs a newer driver .*11040\)\)\. Update NVIDIA's driver, or .* older CUDA than 13\.0"),
    ("13.0", None, "No CUDA GPUs are available", r"sees no CUDA device \(No CUDA GPUs are available\)\. See whether"),
    ("13.0", "5", "No CUDA GPUs are available", r"available; CUDA_VISIBLE_DEVICES is '5'\)\. Let it name a card of nv"),
])  # fmt: skip
def test_a_card_that_is_left_idle_is_told_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, visible: str | None, said: str, told: str
) -> None:
    """A driver too old for the build trained gemma-3-4b on the CPU, and no line said so."""

    def fail() -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    for name in HIDES:
        monkeypatch.delenv(name, raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("mllm_assets.training.models.device.has_nvidia_driver", lambda: True)
    warned: list[str] = []
    assert pick_device("auto", warn=warned.append).kind == "cpu"
    [warning] = warned
    assert re.match(rf"The NVIDIA card of this machine is not used, and the CPU computes: .*{told}", warning)
    pick_device("cpu", warn=warned.append)
    pick_device("auto", use_cpu=True, warn=warned.append)
    assert len(warned) == 1, "asked for"
    with pytest.raises(MachineError, match=told):
        pick_device("cuda")
