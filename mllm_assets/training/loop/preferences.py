"""Learning preferences: the loss of a preferred answer against a rejected one, or of marked answers, and the reference.

The formulas and their names are LLaMA-Factory's (0.9.5, `train/dpo/trainer.py`, `train/kto/trainer.py`), which takes
sigmoid and KTO's loss from TRL 0.24. The reference is the model that the run starts from, without adapters. Its
log-probabilities of all answers are computed once, before the first step, and kept in the run's folder: a step runs one
model, and no tower.

Shape suffixes: P pairs or marked answers, B sequences (of pairs twice as many: all preferred answers, then the others),
S supervised positions.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from mllm_assets.artifacts import digest_json, write_json_atomic
from mllm_assets.errors import MachineError
from mllm_assets.recipe.preference_keys import PreferenceKeys
from mllm_assets.training.encoding.collate import MARKS, OTHERS, REFERENCE, Collator, MarkedCollator
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.row import IGNORE_INDEX
from mllm_assets.training.loop.loss import token_losses
from mllm_assets.training.models.device import Precision, out_of_memory_is_an_error
from mllm_assets.training.models.load import base_model
from mllm_assets.worker.protocol import num_ranks

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

REFERENCE_FILE = "reference_logps.json"
BATCH_KEYS = ("labels", "shift_labels", REFERENCE, MARKS, OTHERS)  # what `forward` does not take


@dataclass(frozen=True, slots=True)
class Found:
    """The loss of a batch, and facts for the log by LLaMA-Factory's names."""

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
) -> Found:
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
    return Found(losses_P.mean(), facts)


def mark_loss(
    spec: PreferenceKeys,
    logps_P: torch.Tensor,
    num_tokens_P: torch.Tensor,
    reference_P: torch.Tensor,
    moved_P: torch.Tensor,
    is_good_P: torch.Tensor,
) -> Found:
    """Return the loss of marked answers.

    Args:
        spec: The recipe's weights.
        logps_P: Of the answers, in this model.
        num_tokens_P: Of each answer.
        reference_P: `logps_P` in the reference.
        moved_P: By how much other rows' answers to the same questions are more likely than in the reference; their
            mean, at least 0, estimates the KL divergence.
        is_good_P: The marks.
    """
    kl = moved_P.mean().clamp(min=0)
    gains_P = logps_P - reference_P
    ahead_P = torch.where(is_good_P, gains_P - kl, kl - gains_P)
    weights_P = torch.where(is_good_P, spec.kto_chosen_weight, spec.kto_rejected_weight)
    loss = (weights_P * (1 - torch.sigmoid(spec.pref_beta * ahead_P))).mean()
    num_good = is_good_P.sum()
    if spec.pref_ftx > 1e-6:  # LLaMA-Factory's limit, and its scale: the mean once more over the good answers
        means_P = torch.where(is_good_P, logps_P / num_tokens_P, 0.0)
        loss = loss - spec.pref_ftx * means_P.sum() / num_good.clamp(min=1) ** 2 * len(logps_P)
    facts: dict[str, torch.Tensor] = {"kl": kl}
    for kind, is_kind_P in (("chosen", is_good_P), ("rejected", ~is_good_P)):
        facts[f"rewards/{kind}"] = (spec.pref_beta * gains_P.detach() * is_kind_P).sum()
        facts[f"logps/{kind}"] = (logps_P.detach() * is_kind_P).sum()
        facts[f"count/{kind}"] = is_kind_P.sum().to(kl.dtype)
    return Found(loss, facts)


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
        ask: Returns the log-probabilities of a batch's answers, and then of the others.
    """

    model: Any
    collator: Collator | MarkedCollator
    precision: Precision
    ask: Callable[[Any, dict[str, Any]], torch.Tensor]

    def logps(self, rows: EncodedRows, batch_size: int, reporter: "Reporter") -> list[tuple[float, float]]:
        """Return both answers' log-probabilities."""
        device = next(self.model.parameters()).device
        disabled = getattr(self.model, "disable_adapter", contextlib.nullcontext)
        batches = DataLoader(rows, batch_size=batch_size, collate_fn=self.collator)  # pyright: ignore[reportArgumentType]
        found: list[tuple[float, float]] = []
        cure = (
            f"It is asked about {batch_size} rows at once: lower per_device_train_batch_size, or "
            "per_device_eval_batch_size for rows that are evaluated."
        )
        self.model.eval()
        with (
            out_of_memory_is_an_error("while the reference was asked", cure),
            torch.no_grad(),
            disabled(),
            self.precision.context(device.type),
        ):
            for batch in batches:
                reporter.progress("reference", len(found), len(rows))
                there: Any = send_to_device(batch, device)
                logps_B = self.ask(self.model, there)
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
    """Refuse to share preferences between processes, which has not been tried.

    Raises:
        MachineError: There are several.
    """
    if not spec.copies_answers and num_ranks() > 1:
        raise MachineError(
            f"stage: {spec.stage} trains in one process here. Set num_processes of the accelerator to 1."
        )
