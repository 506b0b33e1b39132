"""An alias that somebody moved in MLflow's registry: the sensor that sees it, and the job that follows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from mllm_assets.components.assets.step import as_dagster_failures
from mllm_assets.components.automation.retraining import REASON_TAG, read_cursor, write_cursor
from mllm_assets.components.resources import ProjectResource
from mllm_assets.components.wiring import Node
from mllm_assets.errors import MllmAssetsError
from mllm_assets.evaluation.gates import GateSpec
from mllm_assets.layout import Layout
from mllm_assets.releases.registry import Registry, RegistrySpec
from mllm_assets.releases.versions import current_release

EVERY_S = 60
FOLLOW_JOB = "follow_registry_alias"


@dataclass(frozen=True, slots=True)
class Followed:
    """A recipe whose alias is followed, and what its releases must pass."""

    spec: RegistrySpec
    gates: GateSpec


class FollowAlias(dg.Config):
    """Whose alias moved."""

    recipe: str


def registry_automation(nodes: Sequence[Node], layout: Layout) -> dg.Definitions:
    """The sensor and its job for the recipes that have `mlflow_registry`; nothing where none has."""
    followed = {
        node.name: Followed(node.settings.mlflow_registry.to_spec(), node.gates)
        for node in nodes
        if node.eval_data and node.settings.mlflow_registry is not None
    }
    if not followed:
        return dg.Definitions()
    return dg.Definitions(jobs=[follow_job(followed)], sensors=[registry_alias(followed, layout)])


def follow_job(followed: Mapping[str, Followed]) -> dg.JobDefinition:
    """Build the job: it makes the release that the alias names the current one, or fails with the reason."""

    @dg.op(name=FOLLOW_JOB)
    def follow(context: dg.OpExecutionContext, project: ProjectResource, config: FollowAlias) -> None:
        with as_dagster_failures():
            one, mirror = followed[config.recipe], project.mirror(context)
            if mirror:
                mirror.follow_current(config.recipe, all_versions=True)
            release, version = Registry(project.layout, config.recipe, one.spec).follow(one.gates)
            if mirror:
                mirror.push_current(config.recipe)
            text = f"{version.uri} has the alias {one.spec.alias}: {release.version} is the current release now."
            context.log.info(f"{config.recipe}: {text}")
            context.log_event(
                dg.AssetObservation(
                    dg.AssetKey([config.recipe, "released_model"]),
                    description=text,
                    metadata={"current": release.version, "registered_as": version.uri},
                )
            )

    @dg.job(
        name=FOLLOW_JOB,
        description="What the sensor registry_alias launches: the release that a registry's alias names becomes the "
        "current one, if its gates hold.",
    )
    def job() -> None:
        follow()

    return job


def registry_alias(followed: Mapping[str, Followed], layout: Layout) -> dg.SensorDefinition:
    """Build the sensor; on by default, since the settings of its recipes name a registry."""

    @dg.sensor(
        name="registry_alias",
        job_name=FOLLOW_JOB,
        minimum_interval_seconds=EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Sees that the alias of a registered model was moved in MLflow, and makes the release that it "
        "names the current one, if its gates hold.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        seen: dict[str, Any] = dict(read_cursor(context.cursor).get("aliases", {}))
        reasons, requests = [], []
        for recipe, one in followed.items():
            try:
                found = Registry(layout, recipe, one.spec).aliased()
                current = current_release(layout, recipe)
            except MllmAssetsError as error:
                reasons.append(f"{recipe}: {error}")
                continue
            now = found.uri if found else ""
            is_first, has_moved = recipe not in seen, seen.get(recipe) != now
            seen[recipe] = now
            if found is None:
                reasons.append(f"{recipe}: no version has the alias {one.spec.alias}")
            elif current and (found.recipe, found.version) == (recipe, current.version):
                reasons.append(f"{recipe}: {one.spec.alias} names {found.version}, the current release")
            elif is_first or not has_moved:
                reasons.append(
                    f"{recipe}: {one.spec.alias} names version {found.number} of {found.model}, as before; the current "
                    f"release is {current.version if current else 'none'}. Materialise {recipe}/mlflow_model to move "
                    "the alias, or move it in MLflow"
                )
            else:
                requests.append(_request(recipe, one, found.uri))
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=None if requests else "; ".join(reasons),
            cursor=write_cursor(aliases=seen),
        )

    return sensor


def _request(recipe: str, one: Followed, uri: str) -> dg.RunRequest:
    return dg.RunRequest(
        run_config=dg.RunConfig(ops={FOLLOW_JOB: FollowAlias(recipe=recipe)}),
        tags={REASON_TAG: f"{one.spec.alias} was moved to {uri}", "recipe": recipe},
    )
