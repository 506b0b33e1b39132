"""The schedule that retrains each recipe whose inputs changed since its last checkpoint."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

RETRAINING_TAG = "mllm_assets/retraining"  # the first recipe of the line
REASON_TAG = "mllm_assets/reason"
MAX_REASON_CHARS = 500
IN_PROGRESS = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@dataclass(frozen=True, slots=True)
class Outdated:
    """What must be made again, and what would have to be but for a failed check; each with the reason."""

    reasons: dict[dg.AssetKey, str] = field(default_factory=dict)
    blocked: dict[dg.AssetKey, str] = field(default_factory=dict)


def find_outdated(
    repository: dg.RepositoryDefinition, instance: dg.DagsterInstance, selection: Iterable[dg.AssetKey]
) -> Outdated:
    """Find the assets of a selection whose definition or inputs changed since they were made.

    Dagster's own staleness looks one layer up; here an asset is outdated too when one above it is. What lies below a
    failed blocking check is blocked: with the same inputs it would fail again.
    """
    graph, wanted, found = repository.asset_graph, set(selection), Outdated()
    failed = _failed_blocking_checks(repository, instance)
    versions: dict[dg.AssetKey, str | None] = {}
    for key in graph.toposorted_asset_keys:
        event = instance.get_latest_materialization_event(key)
        materialization = event.asset_materialization if event else None
        tags = dict((materialization.tags if materialization else None) or {})
        versions[key] = tags.get("dagster/data_version")
        if key not in wanted:
            continue
        node = graph.get(key)
        changed = [p for p in sorted(node.parent_keys) if p in found.reasons or versions[p] != _seen_version(tags, p)]
        stopped = [
            p for p in sorted(node.parent_keys) if p not in found.reasons and (p in failed or p in found.blocked)
        ]
        if stopped:
            found.blocked[key] = f"blocked by {failed.get(stopped[0], stopped[0].to_user_string())}"
        elif materialization is None:
            found.reasons[key] = "never made"
        elif node.code_version is not None and node.code_version != tags.get("dagster/code_version"):
            found.reasons[key] = "its definition changed"
        elif changed:
            found.reasons[key] = f"{changed[0].to_user_string()} changed"
    return found


def _seen_version(tags: Mapping[str, str], parent: dg.AssetKey) -> str | None:
    return tags.get(f"dagster/input_data_version/{parent.to_user_string()}")


def _failed_blocking_checks(
    repository: dg.RepositoryDefinition, instance: dg.DagsterInstance
) -> dict[dg.AssetKey, str]:
    graph = repository.asset_graph
    records = instance.event_log_storage.get_latest_asset_check_execution_by_key(list(graph.asset_check_keys))
    return {
        key.asset_key: f"the failed check {key.name} of {key.asset_key.to_user_string()}"
        for key, record in records.items()
        if record.status.value == "FAILED" and graph.get(key).blocking
    }


def retrain_line(
    repository: dg.RepositoryDefinition, instance: dg.DagsterInstance, first: str, members: Sequence[str]
) -> dg.RunRequest | str:
    """Ask for one run of all that is outdated of a line of recipes, or say why there is none."""
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
    """Whether a run that is queued or runs makes one of the assets; one that names none may make any."""
    runs = instance.get_runs(dg.RunsFilter(statuses=IN_PROGRESS))
    return any(run.asset_selection is None or run.asset_selection & set(keys) for run in runs)


def _tick(lines: Mapping[str, Sequence[str]], context: dg.ScheduleEvaluationContext):
    """Yield one run request for each line of recipes with something outdated, or one skip reason for all."""
    skipped = []
    for first, members in lines.items():
        asked = retrain_line(context.repository_def, context.instance, first, members)
        if isinstance(asked, str):
            skipped.append(f"{first}: {asked}")
            context.log.info(skipped[-1])  # a tick that launches something has no skip reason to show
        else:
            context.log.info(f"{first} is retrained. {asked.tags[REASON_TAG]}")
            yield asked
    if len(skipped) == len(lines):
        yield dg.SkipReason("; ".join(skipped) or "there is no recipe")


def retraining_job(lines: Mapping[str, Sequence[str]], max_runtime_h: float | None) -> UnresolvedAssetJobDefinition:
    """The job that whatever retrains launches a part of; a run that takes longer is ended by the daemon."""
    members = [member for line in lines.values() for member in line]
    return dg.define_asset_job(
        "retraining",
        selection=dg.AssetSelection.key_prefixes(*([member] for member in members)).upstream(),
        tags=max_runtime_tags(max_runtime_h),
        description="What `weekly_retraining` and `released_model_regression` launch a part of.",
    )


def max_runtime_tags(hours: float | None) -> dict[str, str]:
    """Dagster's tag for the longest that a run may take, which its run monitoring enforces."""
    return {} if hours is None else {"dagster/max_runtime": str(round(hours * 3600))}


def weekly_retraining(
    lines: Mapping[str, Sequence[str]], job: UnresolvedAssetJobDefinition, cron_schedule: str, enabled: bool
) -> dg.ScheduleDefinition:
    """Build the schedule.

    Args:
        lines: First recipe of a line -> the recipes that start from one another, itself included. A line is one run:
            the second trains on what the first has just made.
        job: What it launches a part of.
        cron_schedule: When, as cron writes it.
        enabled: Whether it runs without being switched on in the UI.
    """

    @dg.schedule(
        name="weekly_retraining",
        job=job,
        cron_schedule=cron_schedule,
        default_status=dg.DefaultScheduleStatus.RUNNING if enabled else dg.DefaultScheduleStatus.STOPPED,
        description="Retrains each recipe whose inputs changed since its last checkpoint, and what follows from it.",
    )
    def schedule(context: dg.ScheduleEvaluationContext):
        yield from _tick(lines, context)

    return schedule
