"""What a model must show before it is released. Each gate is a sentence that is true when it passes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mllm_assets.errors import RecipeError

ONE_SIDED_95 = 1.645  # standard errors; normal quantile of 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class GateSpec:
    """Thresholds. A gain must exceed its threshold and its own noise.

    Attributes:
        min_loss_gain_nats: How much lower than the base model's the loss per token must be.
        min_answer_gain: How much label accuracy (or ROUGE-L, without labels), 0..1, must exceed that of always giving
            the most common training answer.
        min_image_gain_nats: How much lower the loss must be with a sample's own images than with another's.
        max_regression_nats: How much higher than the released model's the loss may be.
        num_stderr: How many standard errors a gain must exceed; 0 ignores noise.
    """

    min_loss_gain_nats: float = 0.0
    min_answer_gain: float = 0.0
    min_image_gain_nats: float = 0.0
    max_regression_nats: float = 0.01  # 1 % in perplexity; another machine alone may change the last digits
    num_stderr: float = ONE_SIDED_95

    def __post_init__(self) -> None:
        if self.num_stderr < 0 or self.max_regression_nats < 0:
            raise RecipeError(
                f"A gate's num_stderr and max_regression_nats must be 0 or more, got {self.num_stderr} and "
                f"{self.max_regression_nats}. To allow any regression, give a large max_regression_nats."
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
    metrics: Mapping[str, Any], spec: GateSpec, released: Mapping[str, Any] | None = None
) -> list[GateResult]:
    """Judge the tuned model; of several entries the worst counts.

    Args:
        metrics: What `compute_metrics` returned.
        spec: The thresholds.
        released: The metrics of the newest release; with them, `no_regression_against_release` is judged too.
    """
    results = [
        _gain_gate("beats_base_model", metrics, "tuned_over_base", "loss", spec.min_loss_gain_nats, spec),
        _gain_gate(
            "beats_most_common_answer", metrics, "tuned_over_most_common_answer", None, spec.min_answer_gain, spec
        ),
        _gain_gate(
            "the_model_uses_the_image", metrics, "tuned_over_shuffled_images", "loss", spec.min_image_gain_nats, spec
        ),
    ]
    return results + ([_regression_gate(metrics, released, spec)] if released is not None else [])


def failed(results: Iterable[GateResult]) -> list[GateResult]:
    return [result for result in results if not result.passed]


_GAINS = {
    "beats_base_model": "gain in {metric} over the base model",
    "beats_most_common_answer": "gain in {metric} over always answering {answer!r}",
    "the_model_uses_the_image": "gain in {metric} of the sample's own image over another's",
}


def _gain_gate(
    name: str, metrics: Mapping[str, Any], gain: str, metric: str | None, threshold: float, spec: GateSpec
) -> GateResult:
    """Compare each entry's paired gain with the threshold plus its noise; report the entry with the least margin."""
    worst: tuple[float, GateResult] | None = None
    for entry, scored in metrics["entries"].items():
        chosen = metric or scored["primary"]
        measured = scored["gains"].get(gain, {}).get(chosen)
        if measured is None or measured["num_pairs"] < 2:
            text = f"{entry}: {chosen} was not measured on at least 2 samples, so nothing can be said."
            return GateResult(name=name, passed=False, description=text, observed=None, threshold=None)
        needed = threshold + spec.num_stderr * measured["stderr"]
        claim = _GAINS[name].format(metric=chosen, answer=scored["most_common_answer"])
        result = GateResult(
            name=name,
            passed=measured["mean"] > needed,
            description=f"{entry}: the {claim} is {measured['mean']:.4f}; more than {needed:.4f} is needed "
            f"({threshold:g} plus {spec.num_stderr:g} standard errors of {measured['num_pairs']} samples).",
            observed=measured["mean"],
            threshold=needed,
        )
        if worst is None or measured["mean"] - needed < worst[0]:
            worst = (measured["mean"] - needed, result)
    assert worst is not None, "metrics without entries"
    return worst[1]


def _regression_gate(metrics: Mapping[str, Any], released: Mapping[str, Any], spec: GateSpec) -> GateResult:
    """Compare losses on entries whose samples are the same as when the released model was scored."""
    same = [
        entry
        for entry, scored in metrics["entries"].items()
        if released["entries"].get(entry, {}).get("samples_digest") == scored["samples_digest"]
    ]
    if not same:
        text = "The validation samples changed since the release, so its losses cannot be compared."
        name = "no_regression_against_release"
        return GateResult(name=name, passed=True, description=text, observed=None, threshold=None)
    rise = {e: _tuned_loss(metrics, e) - _tuned_loss(released, e) for e in same}
    entry = max(rise, key=rise.__getitem__)
    return GateResult(
        name="no_regression_against_release",
        passed=rise[entry] <= spec.max_regression_nats,
        description=f"{entry}: loss {_tuned_loss(metrics, entry):.4f} against the release's "
        f"{_tuned_loss(released, entry):.4f} (a rise of at most {spec.max_regression_nats:g} is allowed).",
        observed=rise[entry],
        threshold=spec.max_regression_nats,
    )


def _tuned_loss(metrics: Mapping[str, Any], entry: str) -> float:
    return metrics["entries"][entry]["models"]["tuned"]["loss"]
