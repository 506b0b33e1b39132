"""A `FineTuner` whose samples are pairs of answers, or answers that are marked good or bad."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.encoding.collate import MARKS, OTHERS, REFERENCE
from mllm_assets.training.loop.delta_trainer import DeltaTrainer
from mllm_assets.training.loop.preferences import (
    Found,
    mark_loss,
    pair_loss,
    sequence_logps,
)
from mllm_assets.training.loop.trainer import FineTuner
from mllm_assets.training.models import value_head
from mllm_assets.training.models.load import base_model

Facts = dict[str, torch.Tensor]


class PreferenceTuner(FineTuner, ABC):
    """Logs what the losses of batches say beside them, over the batches since the last line."""

    def __init__(self, spec: TrainSpec, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spec = spec
        self._facts: dict[bool, list[Facts]] = defaultdict(list)  # of evaluation, of training

    @abstractmethod
    def found(self, model: nn.Module, inputs: dict[str, Any]) -> Found:
        """The loss of a batch, and facts about it."""

    def summary(self, facts: Sequence[Facts]) -> dict[str, float]:
        """What a log says of batches: the means of their facts."""
        means = torch.stack([torch.stack([*batch.values()]) for batch in facts]).mean(dim=0).tolist()
        return dict(zip(facts[0], means, strict=True))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
        found = self.found(model, inputs)
        self._facts[not torch.is_grad_enabled()].append(found.facts)
        return (found.loss, {}) if return_outputs else found.loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Each row counts equally, as in TRL's trainers, which LLaMA-Factory uses for preferences
        return DeltaTrainer.evaluate(self, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        measured = next((key for key in logs if key.endswith("loss") and key != "train_loss"), None)
        if measured is not None and (facts := self._facts.pop(measured != "loss", None)):
            prefix = measured.removesuffix("loss")
            logs = {**logs, **{f"{prefix}{name}": value for name, value in self.summary(facts).items()}}
        super().log(logs, *args, **kwargs)


class PairTuner(PreferenceTuner):
    """Learns pairs."""

    def found(self, model: nn.Module, inputs: dict[str, Any]) -> Found:
        logps_B, num_tokens_B = sequence_logps(model, inputs)
        return pair_loss(self.spec, logps_B, num_tokens_B, inputs.get(REFERENCE))


class MarkTuner(PreferenceTuner):
    """Learns answers that are marked good or bad. A reward is a mean over answers, `kl` one over batches."""

    def found(self, model: nn.Module, inputs: dict[str, Any]) -> Found:
        others_P = other_logps(model, inputs)  # first, so that nothing is kept for its gradients
        logps_P, num_tokens_P = sequence_logps(model, inputs)
        moved = others_P - inputs[REFERENCE].chunk(2)[1]
        return mark_loss(self.spec, logps_P, num_tokens_P, inputs[REFERENCE].chunk(2)[0], moved, inputs[MARKS])

    def summary(self, facts: Sequence[Facts]) -> dict[str, float]:
        names = [*facts[0]]
        sums = dict(
            zip(names, torch.stack([torch.stack([*f.values()]) for f in facts]).sum(dim=0).tolist(), strict=True)
        )
        counts = {kind: sums[f"count/{kind}"] for kind in ("chosen", "rejected")}
        told = {
            f"{name}/{kind}": sums[f"{name}/{kind}"] / count
            for kind, count in counts.items()
            if count
            for name in ("rewards", "logps")
        }
        if all(counts.values()):
            told["rewards/margins"] = told["rewards/chosen"] - told["rewards/rejected"]
        return told | {"kl": sums["kl"] / len(facts)}


class ScoreTuner(PreferenceTuner):
    """Learns a head that scores a preferred answer above a rejected one. A reward is a score."""

    def found(self, model: nn.Module, inputs: dict[str, Any]) -> Found:
        chosen_P, rejected_P = value_head.scores(model, base_model(self.model), inputs).chunk(2)
        ahead_P = chosen_P - rejected_P
        facts = {
            "rewards/chosen": chosen_P.detach().mean(),
            "rewards/rejected": rejected_P.detach().mean(),
            "rewards/accuracies": (ahead_P > 0).float().mean(),
            "rewards/margins": ahead_P.detach().mean(),
        }
        return Found(-functional.logsigmoid(ahead_P).mean(), facts)


@torch.no_grad()
def other_logps(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The log-probabilities of other rows' answers to a batch's questions."""
    return sequence_logps(model, inputs[OTHERS])[0]


def pair_logps(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The log-probabilities of preferred answers, and then of the rejected ones."""
    return sequence_logps(model, inputs)[0]


def mark_logps(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The log-probabilities of a batch's own answers, and then of the others."""
    return torch.cat([sequence_logps(model, inputs)[0], other_logps(model, inputs)])
