"""Whether a released model does worse on what it is evaluated on now than on what it was released by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mllm_assets.evaluation.intervals import unpaired_rise


@dataclass(frozen=True, kw_only=True, slots=True)
class Reevaluation:
    """The verdict, and the rise of the loss in nats by entry, that of the worst in `description`."""

    regressed: bool
    description: str
    rises: Mapping[str, Any]


def judge_again(judged: pa.Table, newest: pa.Table, *, max_rise_nats: float) -> Reevaluation:
    """Compare one model's losses on two sets of samples.

    The samples differ, so the intervals are of unpaired means: of new, harder samples the loss rises, and that is what
    is looked for. A rise is a regression where its whole 95 % interval lies above `max_rise_nats`.

    Args:
        judged: The predictions that the model was released by.
        newest: Those of its newest evaluation, by the same weights.
        max_rise_nats: Of the mean loss per token of a sample.
    """
    then, now = _losses_by_entry(judged), _losses_by_entry(newest)
    rises = {entry: unpaired_rise(then[entry], now[entry]) for entry in sorted(then.keys() & now.keys())}
    certain = {entry: rise for entry, rise in rises.items() if rise["low"] is not None}
    if not certain:
        text = "No entry of the newest evaluation is one that the model was released by with at least 2 samples."
        return Reevaluation(regressed=False, description=text, rises=rises)
    entry = max(certain, key=lambda name: certain[name]["low"])
    rise = certain[entry]
    return Reevaluation(
        regressed=rise["low"] > max_rise_nats,
        description=f"{entry}: the loss rose by {rise['mean']:.4f} nats (95 % interval {rise['low']:.4f} to "
        f"{rise['high']:.4f}; {rise['num_before']} samples at the release, {rise['num_after']} now); it is a "
        f"regression where all of the interval is above {max_rise_nats:g}.",
        rises=rises,
    )


def _losses_by_entry(predictions: pa.Table) -> dict[str, np.ndarray]:
    losses: dict[str, list[float]] = {}
    columns = (predictions.column(name).to_pylist() for name in ("model", "entry", "loss_nats"))
    for model, entry, loss in zip(*columns, strict=True):
        if model == "tuned":
            losses.setdefault(entry, []).append(loss)
    return {entry: np.array(values) for entry, values in losses.items()}
