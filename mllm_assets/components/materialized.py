"""What an instance still needs on the disk, for `mllm-assets gc`."""

import os

import dagster as dg

from mllm_assets.components.instance import opened_instance
from mllm_assets.components.slots import find_dead_runs

IN_PROGRESS = [
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def latest_metadata() -> tuple[str, str | None]:
    """What the latest materialisations of the instance of DAGSTER_HOME say, and a run that is in progress.

    Assets read what the ones above them published from this metadata, whatever `latest` points to. Without a
    DAGSTER_HOME nothing outlives a command.
    """
    if not os.environ.get("DAGSTER_HOME"):
        return "", None
    with opened_instance() as instance:
        texts = []
        for key in instance.all_asset_keys():
            event = instance.get_latest_materialization_event(key)
            if event is not None and event.asset_materialization is not None:
                values = event.asset_materialization.metadata.values()
                texts += [value.value for value in values if isinstance(value.value, str)]
        dead = {run.run_id for run in find_dead_runs(instance)}
        running = instance.get_runs(dg.RunsFilter(statuses=IN_PROGRESS))
        alive = next((run for run in running if run.run_id not in dead), None)
    return "\n".join(texts), f"Dagster's run {alive.run_id[:8]} ({alive.job_name})" if alive else None
