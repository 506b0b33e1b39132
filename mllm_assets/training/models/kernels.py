"""Fewer and larger kernels for the text layers of a step, compiled by PyTorch.

Each layer is compiled alone and in place, so that the names of parameters, checkpoints and adapters stay as they are,
and layers of one shape share their code. Losses differ from those of PyTorch's own kernels by rounding.
"""

import importlib.util
import shutil
from typing import Any

import torch

from mllm_assets.errors import MachineError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.models.load import base_model

COMPILERS = ("g++", "clang++", "c++")
MAX_VERSIONS = 64  # of one layer's code: two kinds of attention, training and evaluation, one row and several


def require_kernels(spec: TrainSpec, device_kind: str) -> None:
    """Refuse a recipe whose kernels this machine cannot make.

    Raises:
        MachineError: The device, a compiler or a package is missing. Says which.
    """
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
    if not any(map(shutil.which, COMPILERS)):
        raise MachineError(
            f"torch_compile needs a C++ compiler, and none of {', '.join(COMPILERS)} is in PATH. Install one "
            "(apt-get install g++), or delete torch_compile from the recipe."
        )


def install_kernels(model: Any, spec: TrainSpec) -> None:
    """Let the text layers of a model, adapters included, compute with what the recipe asks for."""
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


def _text_layers(model: Any) -> Any:
    return base_model(model).get_decoder().layers
