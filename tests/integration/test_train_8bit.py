"""AdamW with states in 8 bits: bitsandbytes keeps them, a resume goes on with them, the memory is what is reckoned."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.loop.optimizers import kept_states
from mllm_assets.worker.protocol import Reporter
from tests.interruption import EXACT_FILES, losses, make_task

pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
]
SHORT = {"finetuning_type": "full", "max_steps": 4, "save_steps": 2, "eval_strategy": "no", "weight_decay": 0.1}


def tensors_of(state: dict[str, Any]) -> list[torch.Tensor]:
    """The means and scales of one weight; those in 8 bits are one level deeper."""
    nested = [value for value in state.values() if isinstance(value, dict)]
    own = [value for key, value in state.items() if key.startswith(("state", "absmax"))]
    return own + [tensor for values in nested for tensor in tensors_of(values)]


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_states_have_8_bits_and_a_resumed_run_ends_with_the_same_bits(
    optim: str, parity_dir: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_task(make_task(parity_dir, whole, optim=optim, **SHORT), Reporter())
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    shutil.copy(whole / "run.json", cut)
    result = train_task(make_task(parity_dir, cut, optim=optim, **SHORT), Reporter())
    assert result["resumed_from_step"] == 2
    for name in EXACT_FILES:
        assert (cut / "checkpoint-4" / name).read_bytes() == (whole / "checkpoint-4" / name).read_bytes(), name

    trained = [
        (tensor, "embed_tokens" in name or "position_embedding" in name)
        for name, tensor in load_file(whole / "checkpoint-4" / "trainable.safetensors").items()
    ]
    states = torch.load(whole / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"].values()
    kept = [tensor for state in states for tensor in tensors_of(state)]
    assert {tensor.dtype for tensor in kept} == {torch.uint8, torch.float32}
    reckoned = sum(s.nbytes for p, is_embedding in trained for s in kept_states(optim, p, is_embedding=is_embedding))
    assert sum(tensor.nbytes for tensor in kept) == reckoned
    assert reckoned < 0.7 * sum(2 * tensor.nbytes for tensor, _ in trained)


def test_paged_states_in_32_bits_give_the_losses_of_adamw(parity_dir: Path, tmp_path: Path) -> None:
    found = {}
    for optim in ("adamw_torch_fused", "paged_adamw_32bit", "adamw_8bit"):
        train_task(make_task(parity_dir, tmp_path / optim, optim=optim, **{**SHORT, "save_steps": 9}), Reporter())
        found[optim] = [*losses(tmp_path / optim).values()]
    assert found["paged_adamw_32bit"] == pytest.approx(found["adamw_torch_fused"], abs=1e-5)
    assert found["adamw_8bit"] == pytest.approx(found["adamw_torch_fused"], abs=1e-2)
