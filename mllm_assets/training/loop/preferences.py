"""Learning from pairs: the loss of a preferred answer against a rejected one, and the reference that it is measured by.

The formulas and their names are LLaMA-Factory's (0.9.5, `train/dpo/trainer.py`), which takes sigmoid
from TRL 0.24. The reference is the model that the run starts from, without adapters. Its log-probabilities of all
answers are computed once, before the first step, and kept in the run's folder: a step runs one model, and no tower.

Shape suffixes: P pairs, B sequences (twice as many: all preferred answers, then the others), S supervised positions.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from mllm_assets.artifacts import digest_json, write_json_atomic
from mllm_assets.errors import MachineError
from mllm_assets.recipe.preference_keys import PreferenceKeys
from mllm_assets.training.encoding.collate import REFERENCE, Collator
from mllm_assets.training.encoding.encode import IGNORE_INDEX
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.loop.loss import token_losses
from mllm_assets.training.models.device import Precision
from mllm_assets.training.models.load import base_model
from mllm_assets.worker.protocol import num_ranks

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

REFERENCE_FILE = "reference_logps.json"
BATCH_KEYS = ("labels", "shift_labels", REFERENCE)  # what `forward` does not take


@dataclass(frozen=True, slots=True)
class PairLoss:
    """The loss of a batch of pairs, and what a log says of it by LLaMA-Factory's names."""

    loss: torch.Tensor
    facts: dict[str, torch.Tensor]


def sequence_logps(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each sequence's answer, and its number of tokens.

    Args:
        model: With LoRA around it or not; what `forward` is called on.
        inputs: A batch of the collator with `logits_to_keep` by places.
    """
    made = model(**{name: value for name, value in inputs.items() if name not in BATCH_KEYS}, use_cache=False).logits
    labels_BS = inputs["shift_labels"]
    logps_B = -token_losses(base_model(model), made, labels_BS).sum(dim=-1)
    return logps_B, (labels_BS != IGNORE_INDEX).sum(dim=-1)


def pair_loss(
    spec: PreferenceKeys, logps_B: torch.Tensor, num_tokens_B: torch.Tensor, reference_B: torch.Tensor | None
) -> PairLoss:
    """Return the loss of pairs from the log-probabilities of their answers, in this model and in the reference."""
    means_B = logps_B / num_tokens_B
    scored_B = means_B if spec.averages_tokens else logps_B
    gains_B = scored_B if reference_B is None else scored_B - reference_B
    (chosen_P, rejected_P), (mean_chosen_P, _) = scored_B.chunk(2), means_B.chunk(2)
    ahead_P = torch.sub(*gains_B.chunk(2))
    beta = spec.pref_beta
    if spec.pref_loss == "sigmoid":
        share = spec.dpo_label_smoothing
        losses_P = -functional.logsigmoid(beta * ahead_P) * (1 - share) - functional.logsigmoid(-beta * ahead_P) * share
    elif spec.pref_loss == "simpo":
        losses_P = -functional.logsigmoid(beta * (ahead_P - spec.simpo_gamma / beta))
    else:
        odds_P = ahead_P - (torch.log1p(-torch.exp(chosen_P)) - torch.log1p(-torch.exp(rejected_P)))
        losses_P = -chosen_P - beta * functional.logsigmoid(odds_P)
    if spec.pref_ftx > 1e-6:  # LLaMA-Factory's limit
        losses_P = losses_P - spec.pref_ftx * mean_chosen_P
    reward_P, other_P = (beta * gains_B.detach()).chunk(2)
    facts = {
        "rewards/chosen": reward_P.mean(),
        "rewards/rejected": other_P.mean(),
        "rewards/accuracies": (reward_P > other_P).float().mean(),
        "rewards/margins": (reward_P - other_P).mean(),
        "logps/chosen": chosen_P.detach().mean(),
        "logps/rejected": rejected_P.detach().mean(),
    }
    return PairLoss(losses_P.mean(), facts)


def drop_nothing(model: nn.Module) -> None:
    """Turn dropout off: both answers are compared with what the reference says without it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The model that a run starts from, at work.

    Attributes:
        model: On the device that computes, before its first step, with what is cached taken out.
        collator: Of the run's batches.
        precision: That of the training step.
    """

    model: Any
    collator: Collator
    precision: Precision

    def logps(self, rows: EncodedRows, batch_size: int, reporter: "Reporter") -> list[tuple[float, float]]:
        """Return both answers' log-probabilities."""
        device = next(self.model.parameters()).device
        disabled = getattr(self.model, "disable_adapter", contextlib.nullcontext)
        batches = DataLoader(rows, batch_size=batch_size, collate_fn=self.collator)  # pyright: ignore[reportArgumentType]
        found: list[tuple[float, float]] = []
        self.model.eval()
        with torch.no_grad(), disabled(), self.precision.context(device.type):
            for batch in batches:
                reporter.progress("reference", len(found), len(rows))
                logps_B, _ = sequence_logps(self.model, {name: value.to(device) for name, value in batch.items()})
                found += zip(*(side.tolist() for side in logps_B.chunk(2)), strict=True)
        self.model.train()
        return found


def with_reference(
    reference: Reference, parts: Sequence[EncodedRows], run_dir: Path, batch_sizes: Sequence[int],
    reporter: "Reporter",
) -> None:  # fmt: skip
    """Put the reference's log-probabilities into the rows of each part; those of an earlier start are read.

    Raises:
        DataError: An image is damaged.
    """
    path = run_dir / REFERENCE_FILE
    known = _read(path, [len(part) for part in parts])
    if known is None:
        known = [reference.logps(rows, size, reporter) for rows, size in zip(parts, batch_sizes, strict=True)]
        write_json_atomic(path, {"logps": known, "digest": digest_json(known)})
    for rows, logps in zip(parts, known, strict=True):
        rows.reference = np.array(logps, np.float64).reshape(len(rows), 2)


def _read(path: Path, lengths: Sequence[int]) -> list[list[tuple[float, float]]] | None:
    """What was kept, unless it is damaged or of other rows: it is then computed again."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        logps = kept["logps"]
        is_whole = kept["digest"] == digest_json(logps) and [len(part) for part in logps] == list(lengths)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return logps if is_whole else None


def require_one_process(spec: PreferenceKeys) -> None:
    """Refuse to share pairs between processes, which has not been tried.

    Raises:
        MachineError: There are several.
    """
    if spec.learns_pairs and num_ranks() > 1:
        raise MachineError("stage: dpo trains in one process here. Set num_processes of the accelerator to 1.")
