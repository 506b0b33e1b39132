"""The trainer of a recipe's stage."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_assets.training.caches.prepare import Setup
from mllm_assets.training.encoding.collate import Collator, MarkedCollator
from mllm_assets.training.loop.checkpoints import Resumable
from mllm_assets.training.loop.group_tuner import GroupTuner, RowsCollator
from mllm_assets.training.loop.preference_tuner import MarkTuner, PairTuner, ScoreTuner, mark_logps, pair_logps
from mllm_assets.training.loop.preferences import Reference, drop_nothing, with_reference
from mllm_assets.training.loop.trainer import FineTuner, make_trainer
from mllm_assets.training.models import freezing

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter


def make_tuner(
    setup: Setup,
    run_dir: Path,
    trainable: freezing.TrainableSet,
    collator: Collator,
    resumable: Resumable,
    reporter: "Reporter",
) -> FineTuner:
    """Return the recipe's trainer; one of preferences with what the reference says of the answers."""
    spec, inputs = setup.spec, setup.inputs
    if spec.learns_rewards:
        drop_nothing(trainable.model)
        kind = partial(GroupTuner, spec, collator, reporter)
        return make_trainer(setup, run_dir, trainable, RowsCollator(collator), resumable, reporter, kind)
    if not spec.learns_preferences:
        return make_trainer(setup, run_dir, trainable, collator, resumable, reporter)
    if spec.learns_scores:
        return make_trainer(setup, run_dir, trainable, collator, resumable, reporter, partial(ScoreTuner, spec))
    drop_nothing(trainable.model)
    batches = MarkedCollator(collator) if spec.learns_marks else collator
    kind = partial(MarkTuner if spec.learns_marks else PairTuner, spec)
    tuner = make_trainer(setup, run_dir, trainable, batches, resumable, reporter, kind)
    if spec.has_reference:
        ask = mark_logps if spec.learns_marks else pair_logps
        reference = Reference(model=tuner.model, collator=batches, precision=setup.precision, ask=ask)
        sizes = (spec.per_device_train_batch_size, *[spec.per_device_eval_batch_size] * max(1, len(inputs.eval_parts)))
        parts = (inputs.train_rows, *(inputs.eval_parts.values() or [inputs.eval_rows]))
        with_reference(reference, parts, run_dir, sizes, reporter)
    return tuner
