"""Muon (`use_muon`): the step of a matrix is its momentum, made orthogonal; what else trains has AdamW's.

As in LLaMA-Factory 0.9.5 (`third_party/muon`, after Moonshot's Moonlight): embeddings, heads, vectors and convolutions
are AdamW's, and a matrix's step is made as large as AdamW's, by 0.2 times the root of its longer side.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mllm_assets.recipe.spec import TrainSpec

MOMENTUM, NUM_ITERATIONS = 0.95, 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Newton-Schulz's iteration: the steepest at 0


def is_for_muon(name: str, parameter: torch.Tensor) -> bool:
    """Whether a weight is a matrix between layers."""
    return parameter.ndim == 2 and "embed" not in name and "lm_head" not in name


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return about the nearest orthogonal matrix, in bfloat16."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.bfloat16().T if is_tall else matrix.bfloat16()
    found = found / (found.norm() + 1e-7)
    for _ in range(NUM_ITERATIONS):
        square = found @ found.T
        found = a * found + (b * square + c * square @ square) @ found
    return found.T if is_tall else found


class Muon(torch.optim.Optimizer):
    """One optimizer of two groups, so that schedule, checkpoints and resuming are those of any other."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], spec: TrainSpec) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named:
            (matrices if is_for_muon(name, parameter) else others).append(parameter)
        groups = [{"params": some, "is_muon": some is matrices} for some in (matrices, others) if some]
        betas = (spec.adam_beta1, spec.adam_beta2)
        defaults = {"lr": spec.learning_rate, "weight_decay": spec.weight_decay, "betas": betas}
        super().__init__(groups, {**defaults, "eps": spec.adam_epsilon})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move what has a gradient."""
        assert closure is None, "the trainer computes the loss before"
        for group in self.param_groups:
            move = self._move_matrix if group["is_muon"] else self._move_as_adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    move(parameter, parameter.grad, group)
        return None

    def _move_matrix(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].mul_(MOMENTUM).add_(gradient)
        update = orthogonal(gradient.add(momentum, alpha=MOMENTUM))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(weight.shape)))

    def _move_as_adamw(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state, rate, (beta1, beta2) = self.state[weight], group["lr"], group["betas"]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient)}
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        scale = (1 - beta1 ** state["step"]) / (1 - beta2 ** state["step"]) ** 0.5
        weight.mul_(1 - rate * group["weight_decay"])
        weight.add_(mean / (group["eps"] + square.sqrt()), alpha=-rate / scale)
