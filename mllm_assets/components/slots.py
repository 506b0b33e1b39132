"""Runs whose process was killed: end them, so that the pool slots they hold are free again."""

import os
from pathlib import Path

import dagster as dg

HOLDING = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def find_dead_runs(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Runs of this machine that count as running, and whose processes are all gone."""
    running = instance.get_runs(dg.RunsFilter(statuses=HOLDING))
    pids = {run.run_id: _process_ids(instance, run.run_id) for run in running}
    return [run for run in running if pids[run.run_id] and not any(_is_alive(pid) for pid in pids[run.run_id])]


def find_leftover_holders(instance: dg.DagsterInstance) -> list[str]:
    """Ids of runs that hold a pool's slot though they have ended, or that the instance no longer knows."""
    storage = instance.event_log_storage
    slots = [
        slot for pool in storage.get_concurrency_keys() for slot in storage.get_concurrency_info(pool).claimed_slots
    ]
    runs = {slot.run_id: instance.get_run_by_id(slot.run_id) for slot in slots}
    return [run_id for run_id, run in runs.items() if run is None or run.is_finished]


def end_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Report the dead runs of this machine as failed, and free their slots and those of runs that have ended.

    `kill -9` of a run leaves it "started" for ever, and its slot of the pool `gpu` taken: the next run would wait.

    Returns:
        The ids of those runs.
    """
    dead = []
    for run in find_dead_runs(instance):
        dead.append(run.run_id)
        instance.report_run_failed(run, "Its process is gone (killed, or the machine was restarted).")
    freed = list(dict.fromkeys([*dead, *find_leftover_holders(instance)]))
    for run_id in freed:
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    return freed


def describe_holders(instance: dg.DagsterInstance, pool: str) -> str:
    """Who holds a pool's slots, for a person who waits for one, and what can be done about it."""
    slots = instance.event_log_storage.get_concurrency_info(pool).claimed_slots
    if not slots:
        return "it is being given back."
    holders = []
    for run_id, step_key in sorted({(slot.run_id, slot.step_key) for slot in slots}):
        run = instance.get_run_by_id(run_id)
        if run is None:
            holders.append(f"run {run_id[:8]}, which this instance no longer knows, holds it")
            continue
        pids = ", ".join(str(pid) for pid in sorted(_process_ids(instance, run_id)) if _is_alive(pid))
        alive = f"its processes are {pids}" if pids else "none of its processes is alive here"
        holders.append(f"run {run_id[:8]} ({run.job_name}, {run.status.value}) holds it for {step_key}; {alive}")
    return f"{'; '.join(holders)}. If a run is dead, `mllm-assets slots free` ends it; Ctrl-C stops waiting."


def _process_ids(instance: dg.DagsterInstance, run_id: str) -> set[int]:
    """The processes that the run's own events name: the one that executes it, and its step workers."""
    pids = set()
    for record in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        metadata = record.get_dagster_event().engine_event_data.metadata
        if "pid" in metadata:
            pids.add(int(str(metadata["pid"].value)))
    return pids


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process: it is there
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether the process is dead and only waits for its parent to ask; unknown (False) where there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "Z"
