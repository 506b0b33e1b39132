"""The sensor that looks whether released models got worse on what they are evaluated on now."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import dagster as dg

from mllm_assets.alerts import post_alert, webhook_url
from mllm_assets.artifacts import read_manifest
from mllm_assets.components.cursors import read_cursor, write_cursor
from mllm_assets.components.retraining import retrain_line
from mllm_assets.errors import MllmAssetsError
from mllm_assets.evaluation.regression import Reevaluation, judge_again
from mllm_assets.evaluation.release import read_judged
from mllm_assets.evaluation.release_versions import current_release
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseWatchSettings:
    """When it looks and what it does; see `components.automation_yaml.ReleaseWatch`."""

    enabled: bool
    every_s: int
    max_rise_nats: float
    cooldown_h: float
    alert: bool
    retrain: bool


@dataclass(frozen=True, slots=True)
class _Looked:
    """A released recipe's newest evaluation: its name for the cursor, and what it says."""

    name: str
    verdict: Reevaluation
    version: str


def released_model_regression(
    lines: Mapping[str, Sequence[str]],
    job_name: str,
    layout: Layout,
    settings: ReleaseWatchSettings,
) -> dg.SensorDefinition:
    """Build the sensor.

    Args:
        lines: First recipe of a line -> the recipes that start from one another, itself included.
        job_name: What a retraining launches a part of.
        layout: Where releases and evaluations lie.
        settings: When it looks and what it does.
    """

    @dg.sensor(
        name="released_model_regression",
        job_name=job_name,
        minimum_interval_seconds=settings.every_s,
        default_status=dg.DefaultSensorStatus.RUNNING if settings.enabled else dg.DefaultSensorStatus.STOPPED,
        description="Compares the newest evaluation of each released model with that by which it was released. Where "
        "its loss rose for certain, it says so at the released model, to the webhook, and retrains if it is set to.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        assert context.repository_def is not None
        remembered: dict[str, Any] = read_cursor(context.cursor).get("recipes", {})
        reasons, events, requests = [], [], []
        for first, members in lines.items():
            for recipe in members:
                known = remembered.get(recipe, {})
                looked = _look(context.instance, recipe, layout, settings, known)
                if isinstance(looked, str):
                    reasons.append(f"{recipe}: {looked}")
                    continue
                text = f"{recipe} {looked.version}: {looked.verdict.description}"
                if not looked.verdict.regressed:
                    reasons.append(text)
                    remembered[recipe] = {**known, "looked": looked.name}
                    continue
                left_h = settings.cooldown_h - (time.time() - known.get("alarm_s", 0.0)) / 3600
                if left_h > 0:
                    reasons.append(f"{text} It regressed; no alarm for another {left_h:.1f} h after the last one")
                    continue
                remembered[recipe] = {"looked": looked.name, "alarm_s": time.time()}
                events.append(_observation(recipe, looked))
                text += " It regressed."
                if settings.retrain:
                    asked = retrain_line(context.repository_def, context.instance, first, members)
                    launched = isinstance(asked, dg.RunRequest)
                    requests += [asked] if launched else []
                    text += " It is retrained." if launched else f" It is not retrained: {asked}."
                context.log.warning(text)
                reasons.append(text)
                if settings.alert and webhook_url():
                    _alert(context, recipe, looked, text)
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=None if requests else "; ".join(reasons) or "there is no recipe",
            cursor=write_cursor(recipes=remembered),
            asset_events=events,
        )

    return sensor


def _look(
    instance: dg.DagsterInstance,
    recipe: str,
    layout: Layout,
    settings: ReleaseWatchSettings,
    known: Mapping[str, Any],
) -> _Looked | str:
    """Judge a recipe's release by its newest evaluation, or say why there is nothing to judge."""
    try:
        release = current_release(layout, recipe)
    except MllmAssetsError as error:
        return str(error)
    if release is None:
        return "nothing is released"
    event = instance.get_latest_materialization_event(dg.AssetKey([recipe, "eval_metrics"]))
    if event is None or event.asset_materialization is None:
        return "never evaluated"
    try:
        directory = layout.root / str(event.asset_materialization.metadata["path"].value)
        inputs = read_manifest(directory)["inputs"]
        name = f"{release.version} by {inputs['predictions'][:16]}"
        if known.get("looked") == name:
            return f"no evaluation since the last look at {release.version}"
        if inputs["weights_digest"] != read_manifest(release.directory)["weights_digest"]:
            return f"the newest evaluation is of another model than the release {release.version}"
        newest = read_predictions(layout.root / inputs["predictions_path"])
        verdict = judge_again(read_judged(release), newest, max_rise_nats=settings.max_rise_nats)
    except MllmAssetsError as error:
        return str(error)
    return _Looked(name=name, verdict=verdict, version=release.version)


def _observation(recipe: str, looked: _Looked) -> dg.AssetObservation:
    return dg.AssetObservation(
        dg.AssetKey([recipe, "released_model"]),
        description=f"Regressed on a re-evaluation. {looked.verdict.description}",
        metadata={"version": looked.version, "regression": dg.MetadataValue.json(asdict(looked.verdict))},
    )


def _alert(context: dg.SensorEvaluationContext, recipe: str, looked: _Looked, text: str) -> None:
    alert = {
        "event": "released_model_regressed",
        "recipe": recipe,
        "version": looked.version,
        "rises": looked.verdict.rises,
        "text": text,
    }
    try:
        post_alert(webhook_url(), alert)
    except MllmAssetsError as error:  # the observation and the retraining stand all the same
        context.log.error(str(error))
