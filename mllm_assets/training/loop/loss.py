"""Cross-entropy over a frozen output layer, block by block of the vocabulary.

For a 262k vocabulary the logits of 68 tokens take 71 MB, and their softmax and gradient as much again each. Here a
block of them is made, used for the loss and for the gradient of the hidden states, and forgotten: the same sums in
another order, without the memory, and fast because a block stays in the processor's cache (measured on one thread,
forward and backward, 384 wide: 0.61 -> 0.41 s for 68 tokens, 0.34 -> 0.24 s for 32).

Shape suffixes: S positions, of which those with a label from 0 count, H the language model's hidden size, V vocabulary.
Not covered: an output layer that trains, has a bias, or caps its logits; sharded weights.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.models import value_head

LOSS_BLOCK = 32768  # most of a frozen output layer that is multiplied at once
BLOCK = {"cpu": 2048}  # of the vocabulary; on other devices LOSS_BLOCK
SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # what accelerate sets for its workers


def _read_blocks(
    hidden_SH: torch.Tensor, weight_VH: torch.Tensor, *, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logarithm of the sum of the logits' exponentials, and the head's rows in the mean of their softmax."""
    highest_S1 = torch.full((len(hidden_SH), 1), float("-inf"), device=hidden_SH.device)
    total_S1 = torch.zeros_like(highest_S1)
    mean_SH = torch.zeros_like(hidden_SH, dtype=torch.float32)
    for block_BH in weight_VH.split(BLOCK.get(hidden_SH.device.type, LOSS_BLOCK)):
        logits_SB = (hidden_SH @ block_BH.T).float()
        new_S1 = torch.maximum(highest_S1, logits_SB.amax(dim=1, keepdim=True))
        shrink_S1 = (highest_S1 - new_S1).exp_()
        weights_SB = logits_SB.sub_(new_S1).exp_()
        total_S1 = total_S1 * shrink_S1 + weights_SB.sum(dim=1, keepdim=True)
        if needs_grad:
            mean_SH = mean_SH * shrink_S1 + (weights_SB.to(block_BH.dtype) @ block_BH).float()
        highest_S1 = new_S1
    return (highest_S1 + total_S1.log()).squeeze(1), mean_SH / total_S1


class _FrozenHeadLoss(torch.autograd.Function):
    """Mean loss in nats; the gradient is made on the way, where there is one."""

    @staticmethod
    def forward(
        ctx: Any, hidden_SH: torch.Tensor, weight_VH: torch.Tensor, labels_S: torch.Tensor, label_smoothing: float
    ) -> torch.Tensor:
        hidden_SH = hidden_SH.to(weight_VH.dtype)
        counts_S = labels_S >= 0
        num = counts_S.sum()  # stays on the device: nothing waits for it
        total_S, mean_SH = _read_blocks(hidden_SH, weight_VH, needs_grad=ctx.needs_input_grad[0])
        target_SH = weight_VH[labels_S.clamp(min=0)]
        if label_smoothing:  # the mean of all logits is the product with the mean of all rows
            mean_H = weight_VH.mean(dim=0, dtype=torch.float32).to(weight_VH.dtype)
            target_SH = torch.lerp(target_SH, mean_H, label_smoothing)
        target_logits_S = torch.linalg.vecdot(hidden_SH, target_SH).float()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((mean_SH - target_SH.float()) * counts_S[:, None] / num)
        return ((total_S - target_logits_S) * counts_S).sum() / num

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad_SH,) = ctx.saved_tensors
        return grad_SH * grads[0], None, None, None


class _FrozenHeadLosses(torch.autograd.Function):
    """The loss of each position in nats, 0 without a label."""

    @staticmethod
    def forward(ctx: Any, hidden_SH: torch.Tensor, weight_VH: torch.Tensor, labels_S: torch.Tensor) -> torch.Tensor:
        hidden_SH = hidden_SH.to(weight_VH.dtype)
        counts_S = labels_S >= 0
        total_S, mean_SH = _read_blocks(hidden_SH, weight_VH, needs_grad=ctx.needs_input_grad[0])
        target_SH = weight_VH[labels_S.clamp(min=0)]
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((mean_SH - target_SH.float()) * counts_S[:, None])
        return (total_S - torch.linalg.vecdot(hidden_SH, target_SH).float()) * counts_S

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad_SH,) = ctx.saved_tensors
        return grad_SH * grads[0][:, None], None, None


class _NoHead(nn.Module):
    """Replaces the output layer: the loss reads the hidden states and the layer's weight itself."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def frozen_head_loss(
    hidden_SH: torch.Tensor, weight_VH: torch.Tensor, labels_S: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return the mean cross-entropy in nats of `hidden @ weight.T` against labels; a gradient for `hidden` only.

    `label_smoothing` is the share of each target that is spread over the whole vocabulary.
    """
    with torch.autocast(hidden_SH.device.type, enabled=False):
        return _FrozenHeadLoss.apply(hidden_SH, weight_VH, labels_S, label_smoothing)  # pyright: ignore[reportReturnType]


def token_losses(
    model: Any, made_BSX: torch.Tensor, labels_BS: torch.Tensor, *, without: Sequence[int] = ()
) -> torch.Tensor:
    """Return the loss of each position in nats, 0 without a label.

    Args:
        model: Without LoRA around it.
        made_BSX: What it returns as logits: those, or hidden states where `install` took the output layer.
        labels_BS: -100 where nothing is learnt.
        without: Tokens that cannot come: the probabilities of the others sum to 1. No label is one of them.
    """
    labels_S, made_SX = labels_BS.flatten(), made_BSX.flatten(0, -2)
    left_out = torch.tensor(without, dtype=torch.long, device=made_BSX.device)
    if isinstance(model.lm_head, _NoHead):
        weight_VH = model._frozen_head[0].weight
        with torch.autocast(made_BSX.device.type, enabled=False):
            losses_S: Any = _FrozenHeadLosses.apply(made_SX, weight_VH, labels_S)
            if without:
                losses_S = losses_S + _log_share_left(made_SX, weight_VH, labels_S, losses_S, left_out)
    else:
        logits_SV = made_SX.float()
        logits_SV = logits_SV.index_fill(-1, left_out, float("-inf")) if without else logits_SV
        losses_S = functional.cross_entropy(logits_SV, labels_S, reduction="none")
    return losses_S.view_as(labels_BS)


def _log_share_left(
    hidden_SH: torch.Tensor, weight_VH: torch.Tensor, labels_S: torch.Tensor, losses_S: torch.Tensor,
    left_out: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The logarithm of what some tokens leave of the probability, 0 at positions without a label."""
    hidden_SH = hidden_SH.to(weight_VH.dtype)
    total_S = losses_S + torch.linalg.vecdot(hidden_SH, weight_VH[labels_S.clamp(min=0)]).float()
    share_S = ((hidden_SH @ weight_VH[left_out].T).float() - total_S[:, None]).exp().sum(dim=-1)
    return torch.where(labels_S >= 0, torch.log1p(-share_S.clamp(max=1 - 1e-6)), 0.0)


def install(model: Any, *, label_smoothing: float = 0.0, keeps_head: bool = False) -> bool:
    """Give a model this project's loss where its own would do more work; `forward` stays the library's.

    Where the output layer allows, and unless `keeps_head`, the model then returns hidden states instead of logits.
    Returns whether it does.

    Args:
        model: Without LoRA around it.
        label_smoothing: Share of each target that is spread over the whole vocabulary.
        keeps_head: The output layer is sharded.
    """
    head = model.get_output_embeddings()
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    is_plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad and not capped
    # An untied output layer would be left behind when the model moves to its device
    is_tied = is_plain and head.weight is model.get_input_embeddings().weight
    is_frozen_head = is_tied and not keeps_head and not any(map(os.environ.get, SHARDING))

    def loss(logits: torch.Tensor, labels: Any, vocab_size: int, *, shift_labels: torch.Tensor, **_: Any) -> Any:
        labels_S = shift_labels.flatten()
        if is_frozen_head:
            return frozen_head_loss(logits.flatten(0, -2), head.weight, labels_S, label_smoothing)
        logits_SV = logits.flatten(0, -2).float()
        return functional.cross_entropy(logits_SV, labels_S.to(logits.device), label_smoothing=label_smoothing)

    if is_frozen_head:
        model.lm_head = _NoHead()
        model._frozen_head = [head]  # in a list, so that it is not a submodule
    if is_frozen_head or label_smoothing:
        model.loss_function = loss
    return is_frozen_head


@contextmanager
def own_head(model: Any) -> Iterator[None]:
    """Let a model return logits for a while, where `install` took its output layer."""
    replaced = getattr(model, "lm_head", None)
    if not isinstance(replaced, _NoHead):
        yield
        return
    [model.lm_head] = model._frozen_head
    try:
        yield
    finally:
        model.lm_head = replaced


def install_for(spec: TrainSpec, model: Any) -> bool:
    """Give a model a recipe's loss; as `install`. Of a reward model no logit is computed."""
    if spec.learns_scores:
        value_head.take_output_layer(model)
        return False
    is_spread = bool(spec.fsdp or spec.deepspeed)  # they need the output layer where they can spread it
    return install(model, label_smoothing=spec.label_smoothing_factor, keeps_head=is_spread)


def uninstall(model: Any) -> None:
    """Put back what `install_for` replaced."""
    if not hasattr(model, "lm_head"):  # of no described family
        return
    value_head.put_back(model)
    if isinstance(model.lm_head, _NoHead):
        [model.lm_head] = model._frozen_head
        del model._frozen_head
    vars(model).pop("_loss_function", None)
