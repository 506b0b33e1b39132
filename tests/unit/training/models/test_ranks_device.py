"""Each rank has a card of its own, and is told what is free on it."""

from types import SimpleNamespace

import pytest
import torch

from mllm_assets.errors import MachineError
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
