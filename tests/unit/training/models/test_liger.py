"""Liger's kernels: where they are refused, and on what they are put. They run on a GPU only."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.gemma3 import modeling_gemma3

from mllm_assets.errors import MachineError, RecipeError
from mllm_assets.families.family import FAMILIES
from mllm_assets.training.models import kernels
from mllm_assets.training.models.load import load_model
from tests.unit.training.loop.test_machine import make_spec

SPEC = make_spec(enable_liger_kernel=True)


def test_liger_is_refused_where_it_is_not_installed_or_was_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    kernels.require_kernels(SPEC, "cpu")
    with pytest.raises(MachineError, match=r"needs the package liger-kernel, .*pip install 'mllm-assets\[liger\]'"):
        kernels.require_kernels(SPEC, "cuda")
    kernels.require_liger_layers(SPEC, FAMILIES["gemma3"])
    with pytest.raises(RecipeError, match=r"is for Gemma 3, .* and this model is LLaVA.*\. Delete the line"):
        kernels.require_liger_layers(SPEC, FAMILIES["llava"])


def bound(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_a_run_without_cuda_computes_as_without_the_key(parity_dir: Path) -> None:
    model = load_model(parity_dir / "model")
    kernels.install_kernels(model, SPEC, "cpu")
    assert not bound(model)
    kernels.uninstall_kernels(model, SPEC)


def test_liger_is_put_on_each_norm_and_mlp_of_the_text_layers_and_taken_off_again(parity_dir: Path) -> None:
    """What is published is compared with a model that is loaded anew, in the same process."""
    pytest.importorskip("liger_kernel")
    model, plain = load_model(parity_dir / "model"), modeling_gemma3.apply_rotary_pos_emb
    wanted = [name for name, module in model.named_modules()
              if type(module).__name__ in ("Gemma3RMSNorm", "Gemma3MLP") and "language_model" in name]  # fmt: skip
    kernels.install_liger(model)
    assert bound(model) == wanted and len(wanted) == 7 * model.config.text_config.num_hidden_layers + 1
    assert modeling_gemma3.apply_rotary_pos_emb is not plain
    assert not bound(load_model(parity_dir / "model")), "classes are as they were"
    kernels.uninstall_liger(model)
    assert not bound(model) and modeling_gemma3.apply_rotary_pos_emb is plain
    model(input_ids=torch.tensor([[2, 5, 6]]))
