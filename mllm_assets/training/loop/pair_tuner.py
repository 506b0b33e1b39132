"""A `FineTuner` whose samples are pairs of answers."""

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches.prepare import Setup
from mllm_assets.training.encoding.collate import REFERENCE, Collator
from mllm_assets.training.loop.checkpoints import Resumable
from mllm_assets.training.loop.preferences import Reference, drop_nothing, pair_loss, sequence_logps, with_reference
from mllm_assets.training.loop.trainer import FineTuner, make_trainer
from mllm_assets.training.models import freezing

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter


class PairTuner(FineTuner):
    """Learns pairs, and logs rewards: the means over the batches since the last line."""

    def __init__(self, spec: TrainSpec, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spec = spec
        self._facts: dict[bool, list[dict[str, torch.Tensor]]] = defaultdict(list)  # of evaluation, of training

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
        logps_B, num_tokens_B = sequence_logps(model, inputs)
        found = pair_loss(self.spec, logps_B, num_tokens_B, inputs.get(REFERENCE))
        self._facts[not torch.is_grad_enabled()].append(found.facts)
        return (found.loss, {}) if return_outputs else found.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        measured = next((key for key in logs if key.endswith("loss") and key != "train_loss"), None)
        if measured is not None and (facts := self._facts.pop(measured != "loss", None)):
            means = torch.stack([torch.stack([*batch.values()]) for batch in facts]).mean(dim=0).tolist()
            prefix = measured.removesuffix("loss")
            logs = {**logs, **{f"{prefix}{name}": mean for name, mean in zip(facts[0], means, strict=True)}}
        super().log(logs, *args, **kwargs)


def make_tuner(
    setup: Setup,
    run_dir: Path,
    trainable: freezing.TrainableSet,
    collator: Collator,
    resumable: Resumable,
    reporter: "Reporter",
) -> FineTuner:
    """Return the recipe's trainer; one of pairs with what the reference says of them."""
    spec, inputs = setup.spec, setup.inputs
    if not spec.learns_pairs:
        return make_trainer(setup, run_dir, trainable, collator, resumable, reporter)
    drop_nothing(trainable.model)
    tuner = make_trainer(setup, run_dir, trainable, collator, resumable, reporter, partial(PairTuner, spec))
    if spec.has_reference:
        reference = Reference(model=tuner.model, collator=collator, precision=setup.precision)
        sizes = (spec.per_device_train_batch_size, *[spec.per_device_eval_batch_size] * max(1, len(inputs.eval_parts)))
        parts = (inputs.train_rows, *(inputs.eval_parts.values() or [inputs.eval_rows]))
        with_reference(reference, parts, run_dir, sizes, reporter)
    return tuner
