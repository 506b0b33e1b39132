"""The sensor that checks whether released models got worse on their current evaluation data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import dagster as dg
from pydantic import Field

from mllm_assets.artifacts import read_manifest
from mllm_assets.components.automation.retraining import read_cursor, retrain_chain, write_cursor
from mllm_assets.components.facts import facts_of
from mllm_assets.components.yaml_model import YamlModel
from mllm_assets.errors import MllmAssetsError
from mllm_assets.evaluation.gates import Reevaluation, compare_to_release_time
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout
from mllm_assets.operations.alerts import post_alert, webhook_url
from mllm_assets.process_id import Moment
from mllm_assets.releases.versions import current_release


class ReleaseWatch(YamlModel):
    """The sensor that checks whether released models got worse on their current evaluation data.

    Attributes:
        enabled: Whether it runs without being switched on in the UI.
        every_s: Seconds between two checks.
        max_rise_nats: It alarms if the complete 95 % interval of the rise of the loss is above this.
        cooldown_h: Hours after an alarm without another one.
        alert: Post the alarm to MLLM_ASSETS_ALERT_WEBHOOK, where that is set.
        retrain: Launch a retraining of the recipe's chain, if an input changed.
    """

    enabled: bool = False
    every_s: int = Field(default=3600, ge=1)
    max_rise_nats: float = Field(default=0.05, ge=0)
    cooldown_h: float = Field(default=24.0, ge=0)
    alert: bool = True
    retrain: bool = False


@dataclass(frozen=True, slots=True)
class _Reevaluated:
    """A release and its newest evaluation: the name by which the cursor knows it, and the verdict."""

    name: str
    verdict: Reevaluation
    version: str


def released_model_regression(
    chains: Mapping[str, Sequence[str]], job_name: str, layout: Layout, settings: ReleaseWatch
) -> dg.SensorDefinition:
    """Build the sensor. A retraining of one of the `chains` (see `chains_of`) launches a part of the job."""

    @dg.sensor(
        name="released_model_regression",
        job_name=job_name,
        minimum_interval_seconds=settings.every_s,
        default_status=dg.DefaultSensorStatus.RUNNING if settings.enabled else dg.DefaultSensorStatus.STOPPED,
        description="Compares the newest evaluation of each released model with that at its release. Where the loss "
        "certainly rose, it adds an observation to the released model, posts an alert, and retrains if set to.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        remembered: dict[str, Any] = read_cursor(context.cursor).get("recipes", {})
        reasons, events, requests = [], [], []
        for first, members in chains.items():
            for recipe in members:
                known = remembered.get(recipe, {})
                newest = _reevaluate(context.instance, recipe, layout, settings, known)
                if isinstance(newest, str):
                    reasons.append(f"{recipe}: {newest}")
                    continue
                text = f"{recipe} {newest.version}: {newest.verdict.description}"
                if not newest.verdict.regressed:
                    reasons.append(text)
                    remembered[recipe] = {**known, "looked": newest.name}
                    continue
                alarm = Moment.from_dict(known.get("alarm"))
                left_h = settings.cooldown_h - alarm.elapsed_s() / 3600 if alarm else 0.0
                if alarm and left_h > 0:
                    remembered[recipe] = {**known, "alarm": asdict(alarm.anchored())}
                    reasons.append(f"{text} It regressed; no alarm for another {left_h:.1f} h after the last one")
                    continue
                remembered[recipe] = {"looked": newest.name, "alarm": asdict(Moment.now())}
                events.append(_observation(recipe, newest))
                text += " It regressed."
                if settings.retrain:
                    text += _retrain(context, first, members, requests)
                context.log.warning(text)
                reasons.append(text)
                if settings.alert:
                    _alert(context, recipe, newest, text)
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=None if requests else "; ".join(reasons) or "the project has no recipe",
            cursor=write_cursor(recipes=remembered),
            asset_events=events,
        )

    return sensor


def _retrain(
    context: dg.SensorEvaluationContext, first: str, members: Sequence[str], requests: list[dg.RunRequest]
) -> str:
    """Add the request to retrain a chain of recipes; return the outcome as a sentence."""
    assert context.repository_def is not None
    request = retrain_chain(context.repository_def, context.instance, first, members)
    if isinstance(request, str):
        return f" It is not retrained: {request}."
    requests.append(request)
    return " It is retrained."


def _reevaluate(
    instance: dg.DagsterInstance, recipe: str, layout: Layout, settings: ReleaseWatch, known: Mapping[str, Any]
) -> _Reevaluated | str:
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
        directory = layout.root / str(facts_of(event.asset_materialization.metadata)["path"])
        inputs = read_manifest(directory)["inputs"]
        name = f"{release.version} by {inputs['predictions'][:16]}"
        if known.get("looked") == name:
            return f"no evaluation since the last check of {release.version}"
        if inputs["weights_digest"] != read_manifest(release.directory)["weights_digest"]:
            return f"the newest evaluation is of another model than the release {release.version}"
        newest = read_predictions(layout.root / inputs["predictions_path"])
        verdict = compare_to_release_time(
            read_predictions(release.directory), newest, max_rise_nats=settings.max_rise_nats
        )
    except MllmAssetsError as error:
        return str(error)
    return _Reevaluated(name=name, verdict=verdict, version=release.version)


def _observation(recipe: str, newest: _Reevaluated) -> dg.AssetObservation:
    return dg.AssetObservation(
        dg.AssetKey([recipe, "released_model"]),
        description=f"Regressed on a re-evaluation. {newest.verdict.description}",
        metadata={"version": newest.version, "regression": dg.MetadataValue.json(asdict(newest.verdict))},
    )


def _alert(context: dg.SensorEvaluationContext, recipe: str, newest: _Reevaluated, text: str) -> None:
    if not (url := webhook_url()):
        return
    alert = {
        "event": "released_model_regressed",
        "recipe": recipe,
        "version": newest.version,
        "rises": newest.verdict.rises,
        "text": text,
    }
    try:
        post_alert(url, alert)
    except MllmAssetsError as error:  # the observation and the retraining do not depend on it
        context.log.error(str(error))
