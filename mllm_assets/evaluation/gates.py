"""What a model must show before it is released. Each gate is a sentence that is true when it passes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mllm_assets.errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class GateSpec:
    """Thresholds. A gain counts as its 95 % interval's lower end, so that noise passes nothing.

    Attributes:
        min_loss_gain_nats: How much lower than the base model's the loss per token must be.
        min_answer_gain: How much label accuracy (or ROUGE-L, without labels), 0..1, must exceed that of always giving
            the most common training answer.
        min_image_gain_nats: How much lower the loss must be with a sample's own images than with another's.
        max_regression_nats: How much higher than the released model's the loss may be. Only a rise whose whole
            interval lies above it is a regression.
    """

    min_loss_gain_nats: float = 0.0
    min_answer_gain: float = 0.0
    min_image_gain_nats: float = 0.0
    max_regression_nats: float = 0.01  # 1 % in perplexity; another machine alone may change the last digits

    def __post_init__(self) -> None:
        if self.max_regression_nats < 0:
            raise RecipeError(
                f"The gate max_regression_nats is {self.max_regression_nats}: expected 0 or more. To allow any "
                "regression, give a large number."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """One gate's outcome; `observed` and `threshold` are None where nothing could be measured."""

    name: str
    passed: bool
    description: str
    observed: float | None
    threshold: float | None


def evaluate_gates(
    metrics: Mapping[str, Any], spec: GateSpec, over_release: Mapping[str, Any] | None = None
) -> list[GateResult]:
    """Judge the tuned model; of several entries the worst counts.

    Args:
        metrics: What `compute_metrics` returned.
        spec: The thresholds.
        over_release: What `gains_over_release` returned for the newest release; with it,
            `no_regression_against_release` is judged too.
    """
    results = [
        _gain_gate("beats_base_model", metrics, "tuned_over_base", "loss", spec.min_loss_gain_nats),
        _gain_gate("beats_most_common_answer", metrics, "tuned_over_most_common_answer", None, spec.min_answer_gain),
        _gain_gate("the_model_uses_the_image", metrics, "tuned_over_shuffled_images", "loss", spec.min_image_gain_nats),
    ]
    return results + ([_regression_gate(over_release, spec)] if over_release is not None else [])


def failed(results: Iterable[GateResult]) -> list[GateResult]:
    return [result for result in results if not result.passed]


_GAINS = {
    "beats_base_model": "gain in {metric} over the base model",
    "beats_most_common_answer": "gain in {metric} over always answering {answer!r}",
    "the_model_uses_the_image": "gain in {metric} of the sample's own image over another's",
}


def _gain_gate(name: str, metrics: Mapping[str, Any], gain: str, metric: str | None, threshold: float) -> GateResult:
    """Compare the lower end of each entry's paired gain with the threshold; report the entry with the least margin."""
    judged = []
    for entry, scored in metrics["entries"].items():
        chosen = metric or scored["primary"]
        measured = scored["gains"].get(gain, {}).get(chosen)
        if measured is None or measured["num_pairs"] < 2:
            text = f"{entry}: {chosen} was not measured on at least 2 samples, so nothing can be said."
            return GateResult(name=name, passed=False, description=text, observed=None, threshold=None)
        claim = _GAINS[name].format(metric=chosen, answer=scored["most_common_answer"])
        judged.append(
            GateResult(
                name=name,
                passed=measured["low"] > threshold,
                description=f"{entry}: the {claim} is {_with_interval(measured)}; more than {threshold:g} is needed "
                "of the interval's lower end.",
                observed=measured["low"],
                threshold=threshold,
            )
        )
    return min(judged, key=lambda result: result.observed)


def _regression_gate(over_release: Mapping[str, Any], spec: GateSpec) -> GateResult:
    """Look for a rise of the loss, on the samples that judged the release, that is more than noise."""
    name = "no_regression_against_release"
    losses = {entry: gains["loss"] for entry, gains in over_release.items() if gains["loss"]["num_pairs"] > 1}
    if not losses:
        text = "The validation samples changed since the release, so the losses cannot be compared."
        return GateResult(name=name, passed=True, description=text, observed=None, threshold=None)
    entry = min(losses, key=lambda entry: losses[entry]["high"])
    least_rise = -losses[entry]["high"]
    return GateResult(
        name=name,
        passed=least_rise <= spec.max_regression_nats,
        description=f"{entry}: the gain in loss over the release is {_with_interval(losses[entry])}; it is a "
        f"regression where all of the interval is below {-spec.max_regression_nats:g}.",
        observed=least_rise,
        threshold=spec.max_regression_nats,
    )


def _with_interval(gain: Mapping[str, Any]) -> str:
    return f"{gain['mean']:.4f} (95 % interval {gain['low']:.4f} to {gain['high']:.4f}, {gain['num_pairs']} samples)"
