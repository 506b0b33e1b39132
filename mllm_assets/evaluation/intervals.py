"""How sure a mean of paired per-sample differences is."""

from collections.abc import Mapping
from typing import Any

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
SEED = 42


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
    """`+0.35 (0.27 to 0.43)`; a corpus metric's gain has a p-value in place of an interval."""
    if gain is None:
        return ""
    if "p_value" in gain:
        return f"{gain['mean']:+.4g} (p = {gain['p_value']:.2g})"
    return f"{gain['mean']:+.4g}" + ("" if gain["low"] is None else f" ({gain['low']:.4g} to {gain['high']:.4g})")
