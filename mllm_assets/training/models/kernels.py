"""Fewer and larger kernels for the text layers of a step: compiled by PyTorch, or Liger's.

Each layer is changed alone and in place, so that the names of parameters, checkpoints and adapters stay as they are,
and layers of one shape share their code. Losses differ from those of PyTorch's own kernels by rounding. Loss and vision
tower stay as they are.
"""

import importlib.util
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.gemma3 import modeling_gemma3

from mllm_assets.errors import MachineError, RecipeError
from mllm_assets.families.family import Family
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.models.load import base_model

TANH_GELU = "gelu_pytorch_tanh"  # the one that Liger's GeGLU has
COMPILERS = ("g++", "clang++", "c++")
BOUND = ("forward", "extra_repr", "_get_name")  # by Liger, to a module of its own each
MAX_VERSIONS = 64  # of one layer's code: two kinds of attention, training and evaluation, one row and several

_plain_rotary_positions = modeling_gemma3.apply_rotary_pos_emb


def require_kernels(spec: TrainSpec, device_kind: str) -> None:
    """Refuse a recipe whose kernels this machine cannot make.

    Raises:
        MachineError: The device, a compiler or a package is missing. Says which.
    """
    if uses_liger(spec, device_kind):
        require_compiler("enable_liger_kernel")
    if uses_liger(spec, device_kind) and importlib.util.find_spec("liger_kernel") is None:
        raise MachineError(
            "enable_liger_kernel needs the package liger-kernel, which is not installed. Install it (pip install "
            "'mllm-assets[liger]'), or delete the line: without it the run computes the same, in more kernels."
        )
    if not spec.torch_compile:
        return
    if device_kind not in ("cpu", "cuda"):
        raise MachineError(
            f"torch_compile needs a CUDA device or a CPU, and this run is on {device_kind}. Delete it from the recipe."
        )
    if spec.torch_compile_backend not in (None, "inductor"):  # the others make no code
        return
    if device_kind == "cuda" and importlib.util.find_spec("triton") is None:
        raise MachineError(
            "torch_compile on CUDA needs triton, which PyTorch's CUDA build for Linux brings and this one does not. "
            "Install that build, or delete torch_compile from the recipe."
        )
    require_compiler("torch_compile")


def require_compiler(key: str) -> None:
    """Refuse what makes code while it runs, where nothing can compile it.

    Raises:
        MachineError: A compiler, or Python's headers, which many systems have in a package apart, are missing.
    """
    if not any(map(shutil.which, COMPILERS)):
        raise MachineError(
            f"{key} needs a C++ compiler, and none of {', '.join(COMPILERS)} is in PATH. Install one "
            f"(apt-get install g++), or delete {key} from the recipe."
        )
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.is_file():
        raise MachineError(
            f"{key} needs Python's headers, and {headers} is missing. Install them (apt-get install "
            f"python{sys.version_info.major}.{sys.version_info.minor}-dev), or delete {key} from the recipe."
        )


def uses_liger(spec: TrainSpec, device_kind: str) -> bool:
    """Whether a run computes with Liger's kernels, which are made for GPUs."""
    return spec.enable_liger_kernel and device_kind == "cuda"


def require_liger_layers(spec: TrainSpec, family: Family) -> None:
    """Refuse Liger's kernels for layers that they were not compared with.

    Raises:
        RecipeError: The model is not Gemma 3.
    """
    if spec.enable_liger_kernel and family.model_type != "gemma3":
        raise RecipeError(
            f"enable_liger_kernel is for Gemma 3, with whose layers its kernels were compared, and this model is "
            f"{family.name}. Delete the line; torch_compile: true makes fewer kernels of its layers too."
        )


def install_kernels(model: Any, spec: TrainSpec, device_kind: str) -> None:
    """Let the text layers of a model, adapters included, compute with what the recipe asks for."""
    if uses_liger(spec, device_kind):
        install_liger(model)
    if spec.torch_compile:
        torch._dynamo.config.recompile_limit = MAX_VERSIONS
        for layer in _text_layers(model):
            # any size from the first batch on: a resumed run compiles what the first one did
            layer.compile(dynamic=True, backend=spec.torch_compile_backend or "inductor")


def uninstall_kernels(model: Any, spec: TrainSpec) -> None:
    """Take off what was compiled."""
    if spec.torch_compile:
        for layer in _text_layers(model):
            layer._compiled_call_impl = None
    if spec.enable_liger_kernel:
        uninstall_liger(model)


def install_liger(model: Any) -> None:
    """Compute norms, GeGLU and rotary positions of Gemma 3's text layers with Liger's kernels."""
    from liger_kernel.transformers import liger_rotary_pos_emb, monkey_patch  # pyright: ignore[reportMissingImports]

    for module in _norms_and_mlps(model):
        if isinstance(module, modeling_gemma3.Gemma3RMSNorm):
            monkey_patch._patch_rms_norm_module(module, offset=1.0, casting_mode="gemma", in_place=False)
        else:
            monkey_patch._patch_geglu_module(module)
    modeling_gemma3.apply_rotary_pos_emb = liger_rotary_pos_emb


def uninstall_liger(model: Any) -> None:
    """Take Liger's kernels off, where they are on."""
    for module in _norms_and_mlps(model):
        for name in BOUND:
            vars(module).pop(name, None)
    modeling_gemma3.apply_rotary_pos_emb = _plain_rotary_positions


def _norms_and_mlps(model: Any) -> Iterator[nn.Module]:
    decoder = base_model(model).get_decoder()
    for module in decoder.modules():
        is_geglu = isinstance(module, modeling_gemma3.Gemma3MLP) and module.config.hidden_activation == TANH_GELU
        if is_geglu or isinstance(module, modeling_gemma3.Gemma3RMSNorm):
            yield module


def _text_layers(model: Any) -> Any:
    return base_model(model).get_decoder().layers
