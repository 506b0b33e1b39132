"""What a model must show before it is released. Each gate is a sentence that is true when it passes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mllm_assets import plugins
from mllm_assets.errors import RecipeError
from mllm_assets.evaluation.intervals import unpaired_rise
from mllm_assets.evaluation.metrics import tuned_by_entry


@dataclass(frozen=True, kw_only=True, slots=True)
class GateSpec:
    """Thresholds. A gain counts as its 95 % interval's lower end, so that noise passes nothing.

    Attributes:
        min_loss_gain_nats: How much lower than the base model's the loss per token must be.
        beats_base_by: What must be better than the base model's: the loss, or the answers, whose label accuracy (or
            ROUGE-L) must exceed it by `min_answer_gain`. By default the loss, and of preferences and rewards the
            answers: the loss of a preferred answer often rises while the rejected one becomes far less likely, and what
            is rewarded need not be the reference. So too where a recipe adds tokens: the base model reads its own, and
            a loss per token is then one of other tokens.
        min_answer_gain: How much label accuracy (or ROUGE-L, without labels), 0..1, must exceed that of always giving
            the most common training answer.
        min_image_gain_nats: How much lower the loss must be with a sample's own images than with another's.
        max_regression_nats: How much higher than the released model's the loss may be. Only a rise whose
            complete interval is above it is a regression.
        max_forgetting_nats: How much higher than the base model's the loss on `evaluation.unrelated` may be. Only a
            rise whose complete interval is above it counts. Without it forgetting is measured, and not judged.
        max_benchmark_loss: How much worse than the base model's a sample's score may be, on average, by any metric of
            `benchmarks` that is a number for each sample. Only a fall whose complete interval is above it counts.
        max_reload_difference: By how much, relatively, the loss of the saved and reloaded checkpoint may differ from
            that of the trained model. On a GPU sums differ from call to call; training demands equality on the CPU.
        approval: `required`: a release waits until a person approves the model (`mllm-assets approve RECIPE`).
    """

    # 0.01 is 1 % in perplexity: another order of sums alone moves every loss the same way by some 1e-8, which a
    # threshold of 0 took for a gain with a narrow interval
    min_loss_gain_nats: float = 0.01
    beats_base_by: Literal["loss", "answers"] = "loss"
    min_answer_gain: float = 0.0
    min_image_gain_nats: float = 0.01
    max_regression_nats: float = 0.01
    max_forgetting_nats: float | None = None
    max_benchmark_loss: float | None = None
    max_reload_difference: float = 1e-3
    approval: Literal["required", "not_required"] = "not_required"

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
        observed: The figure of the sentence; it and `threshold` are None where nothing could be measured.
        low, high: Ends of its 95 % interval, one of which is what has to pass `threshold`; None of a figure without.
        required: Whether failing it stops a release. The settings can make `no_leakage` a warning.
    """

    name: str
    passed: bool
    description: str
    observed: float | None
    threshold: float | None
    required: bool = True
    low: float | None = None
    high: float | None = None


Judge = Callable[[Mapping[str, Any], GateSpec, Mapping[str, Any] | None], GateResult | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """One demand on a model.

    Attributes:
        name: That of its check in the graph.
        claim: What is true of a model that passes.
        judge: From what `compute_metrics` returned, the thresholds, and what `gains_over_release` returned (None where
            nothing is released); its result is None where there is nothing to judge. A gate without one looks at files:
            see `reload_gate`, `leakage_gate` and `releases.approvals.approval_gate`.
    """

    name: str
    claim: str
    judge: Judge | None = None


GATES: dict[str, Gate] = {}  # every gate of a release
APPROVAL = "a_person_approved"
FORGETS = "it_forgot_little"
KEEPS = "it_kept_its_benchmarks"
NOTHING_LEAKED = "Nothing that it is evaluated on, nor a near-duplicate, was trained on."


def register(gate: Gate) -> Gate:
    """Add a gate: it is a check of `eval_metrics` that blocks, and a release judges by it.

    Raises:
        RecipeError: Another has its name.
    """
    plugins.add(GATES, gate.name, gate, "gate")
    return gate


def reload_gate(reload: Mapping[str, Any], damage: str | None, spec: GateSpec) -> GateResult:
    """Judge whether the checkpoint can be loaded as it was trained.

    `reload` is what `publish_model` returned when it was saved, `damage` what `find_damage` finds in its files now.
    """
    difference = abs(reload["loss_reloaded"] - reload["loss_saved"]) / max(abs(reload["loss_saved"]), 1e-12)
    num_wrong = reload["num_missing"] + reload["num_unexpected"]
    if damage:
        text = f"{damage}: the checkpoint was changed since it was saved. Train it again."
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
    """Judge what `data.curate.leaks.release_leaks` found; where leakage is allowed, finding some is a warning."""
    text = " ".join(leaks) or NOTHING_LEAKED
    if leaks and not allowed:
        text += " Fix the data, or set `allow_leakage: true` in the recipe's settings; the model card will then say so."
    return GateResult(
        name="no_leakage",
        passed=not leaks,
        description=text,
        observed=float(len(leaks)),
        threshold=0.0,
        required=not allowed,
    )


def evaluate_gates(
    metrics: Mapping[str, Any], spec: GateSpec, release_gains: Mapping[str, Any] | None = None
) -> list[GateResult]:
    """Judge the tuned model by the result of `compute_metrics`; of several entries the worst counts.

    `release_gains`, the result of `gains_over_release`, is needed to judge `no_regression_against_release`.
    """
    results = [gate.judge(metrics, spec, release_gains) for gate in GATES.values() if gate.judge]
    return [result for result in results if result is not None]


def failed(results: Iterable[GateResult]) -> list[GateResult]:
    """Those that stop a release."""
    return [result for result in results if result.required and not result.passed]


def gain_gate(
    name: str, metrics: Mapping[str, Any], gain: str, threshold: float, *, over: str, metric: str | None = None
) -> GateResult:
    """Compare the lower end of each entry's paired gain with a threshold; report the entry with the least margin.

    Args:
        name: The gate's.
        metrics: The result of `compute_metrics`.
        gain: A key of an entry's `gains`.
        threshold: What the lower end must be above.
        over: What the gain is over, in words; `{answer!r}` is the most common training answer.
        metric: Whose gain; by default the entry's primary metric's.
    """
    judged = []
    for entry, scored in metrics["entries"].items():
        chosen = metric or scored["primary"]
        measured = scored["gains"].get(gain, {}).get(chosen)
        if measured is None or measured["num_pairs"] < 2:
            text = f"{entry}: {chosen} was not measured on at least 2 samples, too few to judge."
            return GateResult(name=name, passed=False, description=text, observed=None, threshold=None)
        claim = f"gain in {chosen} {over.format(answer=scored['most_common_answer'])}"
        is_unsure = measured["low"] <= threshold < measured["mean"]
        advice = (
            " The gain itself is above it: more samples to judge by make the interval narrower." if is_unsure else ""
        )
        judged.append(
            GateResult(
                name=name,
                passed=measured["low"] > threshold,
                description=f"{entry}: the {claim} is {_with_interval(measured)}; more than {threshold:g} is needed "
                f"of the interval's lower end.{advice}",
                observed=measured["mean"],
                threshold=threshold,
                low=measured["low"],
                high=measured["high"],
            )
        )
    return min(judged, key=lambda result: result.low)


def _gain_judge(name: str, gain: str, threshold: str, *, over: str, metric: str | None = None) -> Judge:
    """Return the judge of a gate that compares a gain with a threshold of `GateSpec`."""
    return lambda metrics, spec, _: gain_gate(name, metrics, gain, getattr(spec, threshold), over=over, metric=metric)


def _base_gate(metrics: Mapping[str, Any], spec: GateSpec, _: Mapping[str, Any] | None) -> GateResult:
    by_answers = spec.beats_base_by == "answers"
    threshold, metric = (spec.min_answer_gain, None) if by_answers else (spec.min_loss_gain_nats, "loss")
    return gain_gate(
        "beats_base_model", metrics, "tuned_over_base", threshold, over="over the base model", metric=metric
    )


def _regression_gate(
    metrics: Mapping[str, Any], spec: GateSpec, release_gains: Mapping[str, Any] | None
) -> GateResult | None:
    """Look for a rise of the loss, on the samples that judged the release, that is more than noise."""
    if release_gains is None:
        return None
    name = "no_regression_against_release"
    losses = {entry: gains["loss"] for entry, gains in release_gains.items() if gains["loss"]["num_pairs"] > 1}
    if not losses:
        text = "The validation samples changed since the release, so the losses cannot be compared."
        return GateResult(name=name, passed=True, description=text, observed=None, threshold=None)
    return _rise_gate(name, losses, spec.max_regression_nats, over="the release", verdict="it is a regression")


def _forgetting_gate(metrics: Mapping[str, Any], spec: GateSpec, _: Mapping[str, Any] | None) -> GateResult | None:
    """Look for a rise of the loss on unrelated questions that is more than noise and more than is allowed."""
    allowed, measured = spec.max_forgetting_nats, metrics.get("forgetting")
    if allowed is None:
        return None
    if not measured:
        text = "It was not measured: name entries in evaluation.unrelated, for example plain_questions."
        return GateResult(name=FORGETS, passed=False, description=text, observed=None, threshold=allowed)
    losses = {entry: one["gains"]["loss"] for entry, one in measured.items()}
    return _rise_gate(FORGETS, losses, allowed, over="the base model", verdict="too much is forgotten")


def _benchmark_gate(metrics: Mapping[str, Any], spec: GateSpec, _: Mapping[str, Any] | None) -> GateResult | None:
    """Look for a metric of a benchmark that fell by more than noise and more than is allowed."""
    allowed, measured = spec.max_benchmark_loss, metrics.get("benchmarks") or {}
    if allowed is None:
        return None
    gains = {
        f"{task}, {metric}": row["gain"]
        for task, one in measured.items()
        for metric, row in one["metrics"].items()
        if row["gain"] and row["gain"]["low"] is not None
    }
    if not gains:
        text = "No metric with a number for each of several samples was measured: set benchmarks in the settings."
        return GateResult(name=KEEPS, passed=False, description=text, observed=None, threshold=allowed)
    return _rise_gate(
        KEEPS, gains, allowed, over="the base model", verdict="too much is lost", of="worsening of a score"
    )


def _rise_gate(
    name: str,
    gains: Mapping[str, Mapping[str, Any]],
    allowed: float,
    *,
    over: str,
    verdict: str,
    of: str = "rise in loss",
) -> GateResult:
    """Allow no entry to get worse, with all of its interval, by more than `allowed`; report the worst entry."""
    rises = {
        entry: {**gain, "mean": -gain["mean"], "low": -gain["high"], "high": -gain["low"]}
        for entry, gain in gains.items()
    }
    entry = max(rises, key=lambda entry: rises[entry]["low"])
    rise = rises[entry]
    return GateResult(
        name=name,
        passed=rise["low"] <= allowed,
        description=f"{entry}: the {of} over {over} is {_with_interval(rise)}; {verdict} where all of the "
        f"interval is above {allowed:g}.",
        observed=rise["mean"],
        threshold=allowed,
        low=rise["low"],
        high=rise["high"],
    )


def _with_interval(found: Mapping[str, Any]) -> str:
    interval = f"95 % interval {found['low']:z.4f} to {found['high']:z.4f}"
    return f"{found['mean']:z.4f} ({interval}, {found['num_pairs']} samples)"


for _entry in (
    Gate(
        name="checkpoint_reloads_strictly",
        claim="The files on disk are those that were saved, they were loaded again key by key, and gave the same loss "
        "on one batch.",
    ),
    Gate(name="no_leakage", claim=NOTHING_LEAKED),
    Gate(name=APPROVAL, claim="A person saw its figures and said yes (the settings ask for it: `approval: required`)."),
    Gate(
        name="beats_base_model",
        claim="Its loss is lower than that of the model it started from; of preferences and rewards, its answers "
        "are better.",
        judge=_base_gate,
    ),
    Gate(
        name="beats_most_common_answer",
        claim="It answers better than one who always gives the most common training answer.",
        judge=_gain_judge(
            "beats_most_common_answer",
            "tuned_over_most_common_answer",
            "min_answer_gain",
            over="over always answering {answer!r}",
        ),
    ),
    Gate(
        name="the_model_uses_the_image",
        claim="Its loss is lower with a sample's own image than with another sample's.",
        judge=_gain_judge(
            "the_model_uses_the_image",
            "tuned_over_shuffled_images",
            "min_image_gain_nats",
            over="of the sample's own image over another's",
            metric="loss",
        ),
    ),
    Gate(
        name="no_regression_against_release",
        claim="Its loss is not above that of the current release.",
        judge=_regression_gate,
    ),
    Gate(
        name=FORGETS,
        claim="Its loss on questions that have nothing to do with the training did not rise by more than is allowed "
        "(the settings ask for it: `max_forgetting_nats`).",
        judge=_forgetting_gate,
    ),
    Gate(
        name=KEEPS,
        claim="On no benchmark its answers are worse than the base model's by more than is allowed (the settings ask "
        "for it: `max_benchmark_loss`).",
        judge=_benchmark_gate,
    ),
):
    register(_entry)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reevaluation:
    """The verdict, and the rise of the loss in nats by entry; `description` has that of the worst."""

    regressed: bool
    description: str
    rises: Mapping[str, Any]


def compare_to_release_time(judged: pa.Table, newest: pa.Table, *, max_rise_nats: float) -> Reevaluation:
    """Compare one model's losses on two sets of samples.

    The samples differ, so the intervals are of unpaired means: the loss is higher on new, harder samples, and that is
    to be found. A rise of the mean loss per token is a regression if its complete 95 % interval is above
    `max_rise_nats`. `judged` are the predictions that led to the release, `newest` those of the newest evaluation.
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
    rows = tuned_by_entry(predictions)
    return {entry: np.array([row["loss_nats"] for row in some]) for entry, some in rows.items()}
