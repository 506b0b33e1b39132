"""The loss of rewarded answers is that of TRL, and the probabilities are those with which tokens are drawn."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.loop import loss
from mllm_assets.training.loop.rewards import Advantages, reward_loss

NUM_QUESTIONS, NUM_ANSWERS, NUM_PLACES = 3, 4, 5
REWARDS = [[1.0, 0.0, 0.0, 1.2], [0.0, 0.0, 0.0, 0.0], [0.2, 1.2, 1.2, 0.0]]
LENGTHS = [5, 3, 1, 2, 4, 4, 5, 1, 2, 3, 5, 2]
# What `GRPOTrainer._compute_loss` of TRL 1.16.0 gives of these tensors: the loss, the sum of the gradient's sizes, and
# its first value; its `dapo` gives the same as `bnpo`, where a step is one batch
RECORDED = {
    ("bnpo", 0.0, "group"): (-0.14981899313515507, 0.5212012859772297, -0.01899113997487881),
    ("bnpo", 0.0, "batch"): (-0.1715402702843069, 0.5967668557778, -0.021744541303644532),
    ("bnpo", 0.0, "none"): (-0.09594594594594594, 0.3337837837837838, -0.012162162162162161),
    ("bnpo", 0.04, "group"): (-0.12987101515248692, 0.5213252755534087, -0.01813740265300702),
    ("grpo", 0.0, "batch"): (0.0, 0.6555576526358018, -0.013409133803914126),
    ("grpo", 0.04, "group"): (0.021543664755045665, 0.5661209076637751, -0.011184731636020994),
    ("dr_grpo", 0.0, "none"): (-0.03697916666666667, 0.12864583333333332, -0.004687499999999999),
    ("dr_grpo", 0.04, "batch"): (-0.05842619599125659, 0.23005167998017936, -0.008051664034641576),
}
KL = 0.4986994495667041


@pytest.mark.parametrize("case", RECORDED, ids=str)
def test_loss_gradient_and_divergence_are_trls(case: tuple[str, float, str]) -> None:
    loss_type, beta, scale = case
    spec = TrainSpec(
        model_name_or_path="m", dataset="d", template="gemma3", do_train=True, stage="grpo",
        reward={"exact_match": 1.0}, beta=beta, loss_type=loss_type, scale_rewards=scale, max_completion_length=8,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(7)
    shape = (NUM_QUESTIONS * NUM_ANSWERS, NUM_PLACES)
    logps, reference = (-torch.rand(shape, generator=draw, dtype=torch.float64) * 3 for _ in range(2))
    logps.requires_grad_()
    mask = torch.arange(NUM_PLACES)[None] < torch.tensor(LENGTHS)[:, None]
    advantages = Advantages.of(torch.tensor(REWARDS, dtype=torch.float64), scale)
    found, kl = reward_loss(spec, logps, mask, advantages.of_answers_B, reference if beta else None)
    found.backward()
    assert logps.grad is not None
    told = (found.item(), logps.grad.abs().sum().item(), logps.grad[0, 0].item())
    assert told == pytest.approx(RECORDED[case], abs=1e-7)  # a factor of TRL's deviation has 32 bits
    assert kl.item() == pytest.approx(KL if beta else 0.0)


def test_of_answers_that_are_worth_the_same_nothing_is_learnt() -> None:
    advantages = Advantages.of(torch.tensor(REWARDS), "group")
    assert advantages.share_without.item() == pytest.approx(1 / 3)
    assert not advantages.of_answers_B[4:8].any()


@pytest.mark.parametrize("is_taken", [True, False], ids=["output layer taken", "own output layer"])
def test_without_some_tokens_the_others_probabilities_sum_to_one(is_taken: bool) -> None:
    torch.manual_seed(0)
    weight, without = torch.randn(50, 8), [3, 7, 41]
    hidden = torch.randn(2, 3, 8).requires_grad_()
    labels = torch.tensor([[0, 2, -100], [49, 11, 5]])
    head = nn.Linear(8, 50, bias=False)
    head.weight = nn.Parameter(weight, requires_grad=False)
    model = SimpleNamespace(lm_head=loss._NoHead() if is_taken else head, _frozen_head=[head])
    made = hidden if is_taken else hidden @ weight.T
    found = loss.token_losses(model, made, labels, without=without)
    left = [token for token in range(50) if token not in without]
    logits = (hidden @ weight.T)[..., left]
    places = torch.tensor([[left.index(t) if t >= 0 else -100 for t in row] for row in labels.tolist()])
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), places.flatten(), reduction="none").view_as(labels)
    torch.testing.assert_close(found, expected)
    [gradient] = torch.autograd.grad(found.sum(), hidden, retain_graph=True)
    [right] = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(gradient, right)
