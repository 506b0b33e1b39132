"""The schedule that retrains each recipe whose inputs changed since its last checkpoint."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from mllm_assets.components.slots import IN_PROGRESS

RETRAINING_JOB = "retraining"
RETRAINING_TAG = "mllm_assets/retraining"  # the first recipe of the chain
REASON_TAG = "mllm_assets/reason"
MAX_REASON_CHARS = 500
CURSOR_VERSION = 1


@dataclass(frozen=True, slots=True)
class Outdated:
    """The assets to make again, and those that a failed check blocks; each with the reason."""

    reasons: dict[dg.AssetKey, str] = field(default_factory=dict)
    blocked: dict[dg.AssetKey, str] = field(default_factory=dict)


def find_outdated(
    repository: dg.RepositoryDefinition,
    instance: dg.DagsterInstance,
    selection: Iterable[dg.AssetKey],
    *,
    forced: Mapping[dg.AssetKey, str] = MappingProxyType({}),
) -> Outdated:
    """Find the assets of a selection whose definition or inputs changed since they were made, and the `forced` ones.

    Dagster's own staleness looks one layer up; here an asset is also outdated when one upstream of it is. What is
    downstream of a failed blocking check is blocked: with the same inputs it would fail again.
    """
    graph, wanted, found = repository.asset_graph, set(selection), Outdated()
    failed = {
        check.asset_key: f"the failed check {check.name} of {check.asset_key.to_user_string()}"
        for check in failed_blocking_checks(repository, instance)
    }
    versions: dict[dg.AssetKey, str | None] = {}
    seen = "dagster/input_data_version/"
    for key in graph.toposorted_asset_keys:
        event = instance.get_latest_materialization_event(key)
        materialization = event.asset_materialization if event else None
        tags = dict((materialization.tags if materialization else None) or {})
        versions[key] = tags.get("dagster/data_version")
        if key not in wanted:
            continue
        node = graph.get(key)
        parents = sorted(node.parent_keys)
        changed = [p for p in parents if p in found.reasons or versions[p] != tags.get(seen + p.to_user_string())]
        stopped = [p for p in parents if p not in found.reasons and (p in failed or p in found.blocked)]
        if key in forced:
            found.reasons[key] = forced[key]
        elif stopped:
            found.blocked[key] = f"blocked by {failed.get(stopped[0], stopped[0].to_user_string())}"
        elif materialization is None:
            found.reasons[key] = "never made"
        elif node.code_version is not None and node.code_version != tags.get("dagster/code_version"):
            found.reasons[key] = "its definition changed"
        elif changed:
            found.reasons[key] = f"{changed[0].to_user_string()} changed"
    return found


def failed_blocking_checks(
    repository: dg.RepositoryDefinition, instance: dg.DagsterInstance
) -> dict[dg.AssetCheckKey, str]:
    """The blocking checks that failed when they last ran, not only with a warning, and what they said."""
    graph = repository.asset_graph
    records = instance.event_log_storage.get_latest_asset_check_execution_by_key(list(graph.asset_check_keys))
    failed = {}
    for key, record in records.items():
        event = record.event.dagster_event if record.event else None
        if record.status.value != "FAILED" or not graph.get(key).blocking or event is None:
            continue
        if event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            evaluation = event.asset_check_evaluation_data
            if evaluation.severity is dg.AssetCheckSeverity.ERROR:
                failed[key] = evaluation.description or ""
    return failed


def retrain_chain(
    repository: dg.RepositoryDefinition, instance: dg.DagsterInstance, first: str, members: Sequence[str]
) -> dg.RunRequest | str:
    """Request one run of everything outdated in a chain of recipes, or say why nothing is to run."""
    graph = repository.asset_graph
    trained = [m for m in members if instance.get_latest_materialization_event(dg.AssetKey([m, "checkpoint"]))]
    if not trained:
        return "never trained, so there is nothing to retrain"
    own = {key for key in graph.toposorted_asset_keys if key.path[0] in trained}
    keys = dg.AssetSelection.assets(*own).upstream().resolve(graph) & graph.materializable_asset_keys
    if run_in_progress(instance, keys):
        return "a run of it is in progress"
    outdated = find_outdated(repository, instance, keys)
    if not any(key in own for key in outdated.reasons):
        return next(iter(outdated.blocked.values()), "nothing changed")
    why = "; ".join(f"{key.to_user_string()}: {reason}" for key, reason in outdated.reasons.items())
    return dg.RunRequest(
        asset_selection=sorted(outdated.reasons), tags={RETRAINING_TAG: first, REASON_TAG: why[:MAX_REASON_CHARS]}
    )


def run_in_progress(instance: dg.DagsterInstance, keys: Collection[dg.AssetKey]) -> bool:
    """Whether a queued or running run makes one of the assets; a run without a selection may make any."""
    waiting = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED]
    runs = instance.get_runs(dg.RunsFilter(statuses=[*waiting, *IN_PROGRESS]))
    return any(run.asset_selection is None or run.asset_selection & set(keys) for run in runs)


def retraining_job(chains: Mapping[str, Sequence[str]], max_runtime_h: float | None) -> UnresolvedAssetJobDefinition:
    """The job of which each retraining launches a part; the daemon ends a run that takes longer."""
    members = [member for chain in chains.values() for member in chain]
    return dg.define_asset_job(
        RETRAINING_JOB,
        selection=dg.AssetSelection.key_prefixes(*([member] for member in members)).upstream(),
        tags=max_runtime_tags(max_runtime_h),
        description="What `weekly_retraining` and `released_model_regression` launch a part of.",
    )


def max_runtime_tags(hours: float | None) -> dict[str, str]:
    """Dagster's tag for the longest time that a run may take; its run monitoring enforces it."""
    return {} if hours is None else {"dagster/max_runtime": str(round(hours * 3600))}


def weekly_retraining(
    chains: Mapping[str, Sequence[str]], job: UnresolvedAssetJobDefinition, cron_schedule: str, enabled: bool
) -> dg.ScheduleDefinition:
    """Build the schedule, which launches a part of `job`.

    A chain of recipes is one run: the second trains on what the first has just made.
    """

    @dg.schedule(
        name="weekly_retraining",
        job=job,
        cron_schedule=cron_schedule,
        default_status=dg.DefaultScheduleStatus.RUNNING if enabled else dg.DefaultScheduleStatus.STOPPED,
        description="Retrains each recipe whose inputs changed since its last checkpoint, and what follows from it.",
    )
    def schedule(context: dg.ScheduleEvaluationContext):
        skipped = []
        for first, members in chains.items():
            request = retrain_chain(context.repository_def, context.instance, first, members)
            if isinstance(request, str):
                skipped.append(f"{first}: {request}")
                context.log.info(skipped[-1])  # a tick that launches something has no skip reason to show
            else:
                context.log.info(f"{first} is retrained. {request.tags[REASON_TAG]}")
                yield request
        if len(skipped) == len(chains):
            yield dg.SkipReason("; ".join(skipped) or "the project has no recipe")

    return schedule


def read_cursor(text: str | None) -> dict[str, Any]:
    """The values of `write_cursor`; none of another version, or of text that is not a cursor of ours."""
    try:
        cursor = json.loads(text or "{}")
    except ValueError:
        return {}
    if not isinstance(cursor, dict) or cursor.pop("version", None) != CURSOR_VERSION:
        return {}
    return cursor


def write_cursor(**remembered: Any) -> str:
    return json.dumps({"version": CURSOR_VERSION, **remembered}, sort_keys=True)
