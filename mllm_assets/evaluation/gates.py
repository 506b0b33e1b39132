"""What a model must show before it is released. Each gate is a sentence that is true when it passes."""

import math
from collections.abc import Iterable, Mapping, Sequence
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
        max_reload_difference: How far, relatively, the loss of the saved and reloaded checkpoint may be from that of
            the trained model. On a GPU sums differ from call to call; training itself demands equality on the CPU.
    """

    # 0.01 is 1 % in perplexity: another order of sums alone moves every loss the same way by some 1e-8, which a
    # threshold of 0 took for a gain with a narrow interval
    min_loss_gain_nats: float = 0.01
    min_answer_gain: float = 0.0
    min_image_gain_nats: float = 0.01
    max_regression_nats: float = 0.01
    max_reload_difference: float = 1e-3

    def __post_init__(self) -> None:
        if self.max_regression_nats < 0:
            raise RecipeError(
                f"The gate max_regression_nats is {self.max_regression_nats}: expected 0 or more. To allow any "
                "regression, give a large number."
            )
        if self.max_reload_difference < 0:
            raise RecipeError(f"The gate max_reload_difference is {self.max_reload_difference}: expected 0 or more.")


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """One gate's outcome.

    Attributes:
        observed: What was compared with `threshold`; both are None where nothing could be measured.
        required: Whether failing it stops a release. The settings can make `no_leakage` a warning.
    """

    name: str
    passed: bool
    description: str
    observed: float | None
    threshold: float | None
    required: bool = True


# Every gate of a release, and what it claims
GATES = {
    "checkpoint_reloads_strictly": "The files on disk are those that were saved, they were loaded again key by key, "
    "and gave the same loss on one batch.",
    "no_leakage": "Nothing that it is evaluated on, nor a near-duplicate, was trained on.",
    "beats_base_model": "Its loss is lower than that of the model it started from.",
    "beats_most_common_answer": "It answers better than one who always gives the most common training answer.",
    "the_model_uses_the_image": "Its loss is lower with a sample's own image than with another sample's.",
    "no_regression_against_release": "Its loss is not above that of the current release.",
}


def reload_gate(reload: Mapping[str, Any], damage: str | None, spec: GateSpec) -> GateResult:
    """Judge whether the checkpoint can be loaded as it was trained.

    Args:
        reload: What `publish_model` returned when the checkpoint was saved.
        damage: What `find_damage` says of its files now.
        spec: The thresholds.
    """
    difference = abs(reload["loss_reloaded"] - reload["loss_saved"]) / max(abs(reload["loss_saved"]), 1e-12)
    num_wrong = reload["num_missing"] + reload["num_unexpected"]
    if damage:
        text = f"{damage}: the checkpoint was changed since it was saved. Train it again with force: true."
    elif num_wrong:
        text = f"{reload['num_missing']} tensors are missing and {reload['num_unexpected']} unexpected."
    else:
        text = (
            f"The loss on one batch is {reload['loss_reloaded']:.6f} reloaded and {reload['loss_saved']:.6f} as "
            f"trained, {difference:.1e} apart; at most {spec.max_reload_difference:g} is allowed."
        )
    return GateResult(
        name="checkpoint_reloads_strictly",
        passed=damage is None and not num_wrong and difference <= spec.max_reload_difference,
        description=text,
        observed=difference if math.isfinite(difference) else None,
        threshold=spec.max_reload_difference,
    )


def leakage_gate(leaks: Sequence[str], *, allowed: bool) -> GateResult:
    """Judge what `data.leaks.release_leaks` found; where leakage is allowed, finding some is a warning."""
    text = " ".join(leaks) or "Nothing that it is evaluated on, nor a near-duplicate, was trained on."
    if leaks and not allowed:
        text += (
            " Mend the data, or set `allow_leakage: true` in the recipe's settings; the model card will then say so."
        )
    return GateResult(
        name="no_leakage",
        passed=not leaks,
        description=text,
        observed=float(len(leaks)),
        threshold=0.0,
        required=not allowed,
    )


def evaluate_gates(
    metrics: Mapping[str, Any], spec: GateSpec, over_release: Mapping[str, Any] | None = None
) -> list[GateResult]:
    """Judge the tuned model; of several entries the worst counts.

    Args:
        metrics: What `compute_metrics` returned.
        spec: The thresholds.
        over_release: What `gains_over_release` returned for the current release; with it,
            `no_regression_against_release` is judged too.
    """
    return [
        _gain_gate("beats_base_model", metrics, "tuned_over_base", "loss", spec.min_loss_gain_nats),
        _gain_gate("beats_most_common_answer", metrics, "tuned_over_most_common_answer", None, spec.min_answer_gain),
        _gain_gate("the_model_uses_the_image", metrics, "tuned_over_shuffled_images", "loss", spec.min_image_gain_nats),
        *([_regression_gate(over_release, spec)] if over_release is not None else []),
    ]


def failed(results: Iterable[GateResult]) -> list[GateResult]:
    """Those that stop a release."""
    return [result for result in results if result.required and not result.passed]


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
