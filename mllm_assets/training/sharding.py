"""Whole tensors of a model that FSDP or DeepSpeed has spread over processes, and back.

Frozen tensors are never gathered: they are what they were in the model that the run starts from.
Not covered: models of which one process cannot hold all that trains. DeepSpeed's half has not run on a GPU yet.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from mllm_assets.training.checkpoints import trainable_tensors

GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
SPREAD = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)


def with_layers(config: Mapping[str, Any] | None, model: Any) -> dict[str, Any]:
    """Name the layers that FSDP wraps, where `fsdp_config` does not.

    accelerate takes every class that the model lists, and fails on those of which this model has none.
    """
    config = {key.removeprefix("fsdp_"): value for key, value in (config or {}).items()}
    if "transformer_layer_cls_to_wrap" in config or "auto_wrap_policy" in config or config.get("min_num_params"):
        return config
    present = {type(module).__name__ for module in model.modules()}
    return {**config, "transformer_layer_cls_to_wrap": sorted(present & set(model._no_split_modules))}


def is_fsdp(model: Any) -> bool:
    """Whether a model is spread by FSDP (version 2) by now."""
    return isinstance(model, FSDPModule)


def gather_trainable(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return the whole tensors of the named parameters on the CPU; empty on every process but the first."""
    state: dict[str, Any] = get_model_state_dict(model, options=GATHER)
    return {name: state[name].contiguous() for name in names} if state else {}


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the whole optimizer state by parameter name; empty on every process but the first."""
    return get_optimizer_state_dict(model, optimizer, options=GATHER)


def spread_trainable(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give each process its part of tensors that fit; names that the model does not have would be passed over."""
    set_model_state_dict(model, dict(tensors), options=SPREAD)


def spread_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give each process its part of what `gather_optimizer` returned."""
    set_optimizer_state_dict(model, optimizer, state, options=SPREAD)


def gather_from_deepspeed(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what trains, whole, on every process; ZeRO 3 spreads it, ZeRO 1 and 2 do not."""
    from deepspeed.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

    with GatheredParameters([p for p in model.parameters() if p.requires_grad]):
        return {name: tensor.clone() for name, tensor in trainable_tensors(model).items()}
