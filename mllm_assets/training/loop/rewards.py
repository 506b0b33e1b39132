"""Learning from rewards (GRPO): each answer counts against the others to its question.

The formulas and their names are TRL's (1.16, `trainer/grpo_trainer.py`), with one step for each drawing: the policy
that trains is the one that drew, so that the ratio of both is 1 and nothing is clipped.

Shape suffixes: Q questions, G answers to each, B sequences (all answers to the first question first), S supervised
positions, of which `mask_BS` says which are an answer's.
"""

from dataclasses import dataclass

import torch

from mllm_assets.recipe.reward_keys import RewardKeys

ROOM = 1e-4  # beside a standard deviation


@dataclass(frozen=True, slots=True)
class Advantages:
    """How much better each answer is than the others to its question, and how far their rewards are apart."""

    of_answers_B: torch.Tensor
    spread_Q: torch.Tensor

    @classmethod
    def of(cls, rewards_QG: torch.Tensor, scale: str) -> "Advantages":
        """Compare rewards, divided by the standard deviation of a "group", of the "batch", or by "none"."""
        spread_Q = rewards_QG.std(dim=1)
        ahead_QG = rewards_QG - rewards_QG.mean(dim=1, keepdim=True)
        if scale != "none":
            spread = rewards_QG.std() if scale == "batch" else spread_Q[:, None]
            ahead_QG = ahead_QG / (spread + ROOM)
        return cls(ahead_QG.flatten(), spread_Q)

    @property
    def share_without(self) -> torch.Tensor:
        """Of the questions those whose answers are all worth the same, of which nothing is learnt."""
        return torch.isclose(self.spread_Q, torch.zeros_like(self.spread_Q)).float().mean()


def reward_loss(
    spec: RewardKeys,
    logps_BS: torch.Tensor,
    mask_BS: torch.Tensor,
    advantages_B: torch.Tensor,
    reference_BS: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss, and the mean divergence from the reference over all tokens.

    Args:
        spec: The recipe.
        logps_BS: Log-probabilities of the drawn tokens in the model that drew them.
        mask_BS: Which of them are an answer's.
        advantages_B: Of the answers.
        reference_BS: The log-probabilities in the model that the run starts from; None where `beta` is 0.
    """
    mask_BS = mask_BS.to(logps_BS.dtype)
    ratio_BS = torch.exp(logps_BS - logps_BS.detach())
    losses_BS = -ratio_BS * advantages_B[:, None].to(logps_BS)
    kl = logps_BS.new_zeros(())
    if reference_BS is not None:
        behind_BS = reference_BS - logps_BS
        kl_BS = torch.exp(behind_BS) - behind_BS - 1
        losses_BS = losses_BS + spec.beta * kl_BS
        kl = (kl_BS.detach() * mask_BS).sum() / mask_BS.sum()
    if spec.loss_type == "grpo":
        return ((losses_BS * mask_BS).sum(dim=1) / mask_BS.sum(dim=1)).mean(), kl
    if spec.loss_type == "dr_grpo":
        return (losses_BS * mask_BS).sum() / (len(losses_BS) * spec.max_completion_length), kl
    return (losses_BS * mask_BS).sum() / mask_BS.sum(), kl
