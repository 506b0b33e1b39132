"""How sure a gain is: a mean of paired per-sample differences, or the difference of two scores of a whole corpus."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
SEED = 42
METHOD = (
    f"paired bootstrap over samples, {CONFIDENCE:.0%} percentile interval, {NUM_RESAMPLES} resamples, seed {SEED}; "
    "BLEU and chrF are computed anew of each resample's statistics, p is that of sacrebleu's own paired bootstrap"
)


def paired_gain(differences: np.ndarray) -> dict[str, Any]:
    """Mean of the differences, N values, with the paired bootstrap's 95 % percentile interval.

    The interval is seeded, so that the same predictions give the same bytes.

    Returns:
        `mean`, `low`, `high` (both None for one sample, which says nothing of its noise) and `num_pairs`.
    """
    from scipy.stats import bootstrap

    result = {"mean": float(differences.mean()), "low": None, "high": None, "num_pairs": len(differences)}
    if len(differences) > 1:
        interval = bootstrap(
            (differences,),
            np.mean,
            n_resamples=NUM_RESAMPLES,
            batch=max(1, 2**22 // len(differences)),  # 32 MiB at a time
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(SEED),
        ).confidence_interval
        result |= {"low": float(interval.low), "high": float(interval.high)}
    return result


def paired_corpus_interval(this: np.ndarray, other: np.ndarray, score: Callable[[np.ndarray], float]) -> dict[str, Any]:
    """The interval of the difference of two systems' corpus scores, each resample taking the same samples of both.

    Args:
        this: What a score adds up of each sample, N samples x K statistics.
        other: The same of the other system.
        score: From K sums to the score.

    Returns:
        `low` and `high`, both None for one sample.

    Source:
        Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation", section 4.
    """
    if len(this) < 2:
        return {"low": None, "high": None}
    rng = np.random.default_rng(SEED)
    chosen = (rng.integers(0, len(this), len(this)) for _ in range(NUM_RESAMPLES))
    differences = [score(this[rows].sum(axis=0)) - score(other[rows].sum(axis=0)) for rows in chosen]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(differences, [tail, 100 - tail])
    return {"low": float(low), "high": float(high)}


def unpaired_rise(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """How much the mean rose from one set of samples, N values, to another, M, with the bootstrap's 95 % interval.

    Returns:
        `mean`, `low`, `high`, and `num_before`, `num_after`; `low` and `high` are None where one set has one sample.
    """
    from scipy.stats import bootstrap

    result = {
        "mean": float(after.mean() - before.mean()), "low": None, "high": None,
        "num_before": len(before), "num_after": len(after),
    }  # fmt: skip
    if min(len(before), len(after)) > 1:
        interval = bootstrap(
            (before, after),
            lambda first, second, axis: second.mean(axis=axis) - first.mean(axis=axis),
            n_resamples=NUM_RESAMPLES,
            batch=max(1, 2**22 // max(len(before), len(after))),
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(SEED),
        ).confidence_interval
        result |= {"low": float(interval.low), "high": float(interval.high)}
    return result


def gain_text(gain: Mapping[str, Any] | None) -> str:
    """`+0.35 (0.27 to 0.43)`; a corpus metric's gain has the p-value of a paired test beside its interval."""
    if gain is None:
        return ""
    known = [] if gain.get("low") is None else [f"{gain['low']:.4g} to {gain['high']:.4g}"]
    known += [f"p = {gain['p_value']:.2g}"] if "p_value" in gain else []
    return f"{gain['mean']:+.4g}" + (f" ({', '.join(known)})" if known else "")
