"""A `FineTuner` that learns from rewards of answers that its own model gives: GRPO."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from mllm_assets.artifacts import digest_json
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.encoding.row import IGNORE_INDEX, EncodedRow
from mllm_assets.training.loop.loss import token_losses
from mllm_assets.training.loop.preference_tuner import PreferenceTuner
from mllm_assets.training.loop.preferences import BATCH_KEYS, Found
from mllm_assets.training.loop.rewards import Advantages, reward_loss
from mllm_assets.training.loop.trainer import NUM_PADDING, NUM_TOKENS, FineTuner
from mllm_assets.training.models.load import base_model

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

ROWS = "rows"
MOST_IDLE_STEPS = 10  # after which it is said that nothing is learnt


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewarded:
    """An answer that the model gave: its question as it was asked, its token ids, and what it is worth."""

    prompt: EncodedRow
    ids: tuple[int, ...]
    ended: bool
    reward: float
    parts: Mapping[str, float]  # the metrics that it is made of


class Rewards(Protocol):
    """Draws answers from the model that trains, and says what each is worth."""

    never: Sequence[int]

    def draw(self, rows: Sequence[EncodedRow], seed: int) -> Sequence[Rewarded]:
        """`num_generations` answers to each row's question, those of the first row first."""
        ...

    def describe(self) -> str:
        """What is rewarded, for the log."""
        ...


@dataclass(frozen=True, slots=True)
class RowsCollator:
    """Batches that hold their rows too: whose answers are drawn when the batch is trained on."""

    collator: Collator

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, Any]:
        return {**self.collator(rows), ROWS: [*rows]}


class GroupTuner(PreferenceTuner):
    """Learns what is rewarded; evaluation measures the loss of the rows' own answers, as of `stage: sft`.

    Attributes:
        rewards: What draws and rewards answers.
    """

    rewards: Rewards

    def __init__(self, spec: TrainSpec, collator: Collator, reporter: "Reporter", **kwargs: Any) -> None:
        super().__init__(spec, **kwargs)
        self._collator, self._reporter, self._num_idle_steps = collator, reporter, 0
        trained = [p for p in self.model.parameters() if p.requires_grad] if spec.beta else []
        self._start = [(parameter, parameter.detach().clone()) for parameter in trained]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        inputs = {**inputs, NUM_TOKENS: 0, NUM_PADDING: 0}  # counted once the answers are known
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return super().compute_loss(model, inputs, *args, **kwargs)
        return FineTuner.compute_loss(self, model, {k: v for k, v in inputs.items() if k != ROWS}, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return FineTuner.evaluate(self, *args, **kwargs)

    def found(self, model: nn.Module, inputs: dict[str, Any]) -> Found:
        answers = self.rewards.draw(inputs[ROWS], self._seed())
        rewards_QG = torch.tensor([answer.reward for answer in answers]).view(-1, self.spec.num_generations)
        advantages = Advantages.of(rewards_QG, self.spec.scale_rewards)
        batch: dict[str, Any] = self._prepare_inputs(self._collator([*map(as_row, answers)]))
        self._count(answers, batch)
        self._say_if_idle(advantages)
        reference_BS = None
        if self.spec.beta:
            with torch.no_grad(), self._as_it_started():  # first, so that nothing is kept for its gradients
                reference_BS = self._logps(model, batch)
        logps_BS, mask_BS = self._logps(model, batch), batch["shift_labels"] != IGNORE_INDEX
        loss, kl = reward_loss(self.spec, logps_BS, mask_BS, advantages.of_answers_B, reference_BS)
        facts = {
            "reward": rewards_QG.mean(),
            "reward_std": advantages.spread_Q.mean(),
            "frac_reward_zero_std": advantages.share_without,
            "completions/mean_length": torch.tensor([float(len(answer.ids)) for answer in answers]).mean(),
            "completions/clipped_ratio": torch.tensor([float(not answer.ended) for answer in answers]).mean(),
        }
        for name in self.spec.reward or ():
            facts[f"rewards/{name}"] = torch.tensor([answer.parts[name] for answer in answers]).mean()
        return Found(loss, facts | ({"kl": kl.cpu()} if self.spec.beta else {}))

    def _logps(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """The log-probabilities with which the answers' tokens are drawn."""
        made = model(**{name: value for name, value in batch.items() if name not in BATCH_KEYS}, use_cache=False)
        return -token_losses(base_model(model), made.logits, batch["shift_labels"], without=self.rewards.never)

    def _seed(self) -> int:
        """Of a batch's answers: the same where a run goes on from a checkpoint, whatever was drawn before."""
        return int(digest_json([self.spec.seed, self.state.global_step, len(self._batches)])[:8], 16)

    def _count(self, answers: Sequence[Rewarded], batch: Mapping[str, Any]) -> None:
        num_tokens = sum(len(answer.prompt.input_ids) + len(answer.ids) for answer in answers)
        self._num_tokens += num_tokens
        self.padding.add(num_tokens, batch["labels"].numel() - num_tokens)

    def _say_if_idle(self, advantages: Advantages) -> None:
        self._num_idle_steps = self._num_idle_steps + 1 if advantages.share_without == 1 else 0
        if self._num_idle_steps == MOST_IDLE_STEPS:
            self._reporter.warn(
                f"In {MOST_IDLE_STEPS} batches all answers to a question had the same reward, of which nothing is "
                "learnt. Train the model to answer rightly now and then first (stage: sft), or reward parts of answers."
            )

    @contextmanager
    def _as_it_started(self) -> Iterator[None]:
        trained = [parameter.data for parameter, _ in self._start]
        for parameter, start in self._start:
            parameter.data = start
        try:
            yield
        finally:
            for (parameter, _), values in zip(self._start, trained, strict=True):
                parameter.data = values


def as_row(answer: Rewarded) -> EncodedRow:
    """A question with the answer that was drawn, which is learnt."""
    prompt, ids = answer.prompt, array("i", answer.ids)
    ignored = array("i", [IGNORE_INDEX]) * len(prompt.input_ids)
    return replace(prompt, input_ids=prompt.input_ids + ids, labels=ignored + ids)
