"""How sure a gain is: a mean of paired per-sample differences, or the difference of two corpus scores."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
SEED = 42
METHOD = (
    f"paired bootstrap over samples, {CONFIDENCE:.0%} percentile interval, {NUM_RESAMPLES} resamples, seed {SEED}; "
    "samples that show the same picture are drawn together; "
    "BLEU and chrF are computed again from each resample's statistics, p is that of sacrebleu's own paired bootstrap"
)


def paired_gain(differences: np.ndarray, pictures: np.ndarray | None = None) -> dict[str, Any]:
    """Mean of the differences, N values, with the paired bootstrap's 95 % percentile interval.

    The interval is seeded, so that the same predictions give the same bytes.

    Args:
        differences: One for each sample.
        pictures: Number of each sample's picture, N values; None where each has its own. Ten questions about one
            picture are not ten independent samples: resamples take or leave a picture with all of them.

    Returns:
        `mean`, `low`, `high` (both None for one picture, which says nothing of its noise) and `num_pairs`.

    Source:
        Field and Welsh 2007, "Bootstrapping clustered data", the cluster bootstrap.
    """
    gain = {"mean": float(differences.mean()), "num_pairs": len(differences)}
    if pictures is None:
        return {**gain, **_interval((differences,), np.mean)}
    sums, counts = of_pictures(differences, pictures), of_pictures(np.ones(len(differences)), pictures)
    mean = lambda sums, counts, axis: sums.sum(axis=axis) / counts.sum(axis=axis)  # noqa: E731
    return {**gain, **_interval((sums, counts), mean, paired=True)}


def of_pictures(values: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """The sums of samples' values, N (x K), over each picture's samples."""
    _, numbers = np.unique(pictures, return_inverse=True)
    sums = np.zeros((numbers.max() + 1, *values.shape[1:]))
    np.add.at(sums, numbers, values)
    return sums


def paired_corpus_interval(
    this: np.ndarray,
    other: np.ndarray,
    score: Callable[[np.ndarray], float],
    pictures: np.ndarray | None = None,
) -> dict[str, Any]:
    """The interval of the difference of two systems' corpus scores, each resample taking the same samples of both.

    Args:
        this: What a score adds up of each sample, N samples x K statistics.
        other: The same of the other system.
        score: From K sums to the score.
        pictures: As for `paired_gain`.

    Returns:
        `low` and `high`, both None for one picture.

    Source:
        Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation", section 4.
    """
    if pictures is not None:
        this, other = of_pictures(this, pictures), of_pictures(other, pictures)
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
    interval = _interval((before, after), lambda first, second, axis: second.mean(axis=axis) - first.mean(axis=axis))
    rise = float(after.mean() - before.mean())
    return {"mean": rise, **interval, "num_before": len(before), "num_after": len(after)}


def _interval(
    samples: tuple[np.ndarray, ...], statistic: Callable[..., Any], *, paired: bool = False
) -> dict[str, float | None]:
    from scipy.stats import bootstrap

    if min(map(len, samples)) < 2:
        return {"low": None, "high": None}
    interval = bootstrap(
        samples,
        statistic,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, 2**22 // max(map(len, samples))),  # 32 MiB at a time
        confidence_level=CONFIDENCE,
        method="percentile",
        paired=paired,
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return {"low": float(interval.low), "high": float(interval.high)}


def gain_text(gain: Mapping[str, Any] | None) -> str:
    """`+0.35 (0.27 to 0.43)`; a corpus metric's gain has the p-value of a paired test next to its interval."""
    if gain is None:
        return ""
    known = [] if gain.get("low") is None else [f"{gain['low']:.4g} to {gain['high']:.4g}"]
    known += [f"p = {gain['p_value']:.2g}"] if "p_value" in gain else []
    return f"{gain['mean']:+.4g}" + (f" ({', '.join(known)})" if known else "")
