"""Whether a model is better than the released one, on the samples that both were asked."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from mllm_assets.evaluation import scores
from mllm_assets.evaluation.metrics import gain_over, labels_of, per_sample


def gains_over_release(predictions: pa.Table, released: pa.Table) -> dict[str, dict[str, Any]]:
    """Paired differences of two tuned models, per entry that asks both the same of the same samples.

    Args:
        predictions: Those of the model at hand.
        released: Those that the released model was judged by.

    Returns:
        `{entry: {metric: gain}}`, positive when better than the release; other entries are left out.
    """
    now, then = _tuned_by_entry(predictions), _tuned_by_entry(released)
    result = {}
    for entry in sorted(now.keys() & then.keys()):
        if _asked(now[entry]) == _asked(then[entry]):
            references, labels = [row["reference"] for row in now[entry]], labels_of(now[entry])
            pair = [per_sample(rows[entry], references, labels) for rows in (now, then)]
            tuned, released_one = ([row["answer"] for row in rows[entry]] for rows in (now, then))
            result[entry] = gain_over(*pair) | scores.corpus_gains(tuned, released_one, references)
    return result


def _tuned_by_entry(predictions: pa.Table) -> dict[str, list[dict[str, Any]]]:
    by_entry: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(predictions.to_pylist(), key=lambda row: row["row_index"]):
        if row["model"] == "tuned":
            by_entry.setdefault(row["entry"], []).append(row)
    return by_entry


def _asked(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["sample_id"], row["prompt"], row["reference"], row["label"]) for row in rows]
