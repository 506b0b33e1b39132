"""The sensor that releases a model once a person has approved it."""

from collections.abc import Mapping, Sequence

import dagster as dg

from mllm_assets.artifacts import read_manifest
from mllm_assets.components.automation.retraining import run_in_progress
from mllm_assets.components.facts import facts_of
from mllm_assets.components.wiring import Node
from mllm_assets.errors import MllmAssetsError
from mllm_assets.evaluation.gates import APPROVAL
from mllm_assets.layout import Layout
from mllm_assets.releases.approvals import Decision, Subject, read_decisions
from mllm_assets.releases.versions import list_releases

EVERY_S = 30


def approval_sensors(nodes: Sequence[Node], layout: Layout) -> list[dg.SensorDefinition]:
    """The sensor for the recipes whose release waits for a person, if there are any."""
    waiting = {
        node.name: [
            node.key("released_model"),
            *[node.key("hub_model")] * (node.settings.push_to_hub is not None),
            *[node.key("mlflow_model")] * (node.settings.mlflow_registry is not None),
        ]
        for node in nodes
        if node.eval_data and node.settings.gates.needs_approval
    }
    return [approved_release(waiting, layout)] if waiting else []


def approved_release(waiting: Mapping[str, Sequence[dg.AssetKey]], layout: Layout) -> dg.SensorDefinition:
    """Build the sensor; on by default, since the settings of its recipes ask a person (`approval: required`).

    Args:
        waiting: Recipe -> its release, and what is made of that.
        layout: The project's folders.
    """

    @dg.sensor(
        name="approved_release",
        target=dg.AssetSelection.assets(*[key for keys in waiting.values() for key in keys]),
        minimum_interval_seconds=EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Releases the last evaluated model of a recipe with `approval: required` once a person has "
        "approved it: mllm-assets approve RECIPE, or the board.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        reasons, requests = [], []
        for recipe, keys in waiting.items():
            decision = _approved(context.instance, recipe, layout)
            if isinstance(decision, str):
                reasons.append(f"{recipe}: {decision}")
            elif run_in_progress(context.instance, keys):
                reasons.append(f"{recipe}: a run of its release is in progress")
            else:
                requests.append(
                    dg.RunRequest(
                        # once for a decision: a release that failed is not tried again by itself
                        run_key=f"{recipe} {decision.subject.predictions_digest[:16]} {decision.when}",
                        asset_selection=list(keys),
                        tags={"mllm_assets/reason": f"approved by {decision.who}"},
                    )
                )
        return dg.SensorResult(run_requests=requests, skip_reason=None if requests else "; ".join(reasons))

    return sensor


def _approved(instance: dg.DagsterInstance, recipe: str, layout: Layout) -> Decision | str:
    """The yes to the model that was evaluated last and is not released, or why there is none."""
    event = instance.get_latest_materialization_event(dg.AssetKey([recipe, "eval_metrics"]))
    if event is None or event.asset_materialization is None:
        return "it was never evaluated"
    try:
        subject = Subject.of(layout.root / str(facts_of(event.asset_materialization.metadata)["path"]))
        about = [decision for decision in read_decisions(layout, recipe) if decision.subject == subject]
        releases = [(one.version, read_manifest(one.directory)) for one in list_releases(layout, recipe)]
    except MllmAssetsError as error:
        return str(error)
    held = [version for version, manifest in releases if manifest["weights_digest"] == subject.weights_digest]
    if held:
        return f"its last evaluated model is released, as {held[-1]}"
    if not about:
        return f"{APPROVAL} waits: mllm-assets approve {recipe}"
    return about[-1] if about[-1].approved else f"it was {about[-1]}"
