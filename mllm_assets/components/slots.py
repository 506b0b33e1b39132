"""Runs whose process was killed: end them, so that the pool slots they hold are free again."""

import json
import os
import socket
import time
from pathlib import Path

import dagster as dg
from dagster._core.storage.tags import GRPC_INFO_TAG

HOST_TAG = "mllm_assets/host"  # of a run that has used the accelerator: the machine it runs on
CLOCK_SLACK_S = 2.0  # a process names itself in an event some time after it began, never before
HOLDING = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def name_host(instance: dg.DagsterInstance, run_id: str) -> None:
    """Tag a run with the machine it runs on: on another one that shares the instance its pids mean nothing."""
    instance.add_run_tags(run_id, {HOST_TAG: socket.gethostname()})


def find_dead_runs(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Runs of this machine that count as running, and whose processes are all gone."""
    running = [run for run in instance.get_runs(dg.RunsFilter(statuses=HOLDING)) if _runs_here(instance, run)]
    seen = {run.run_id: _processes(instance, run.run_id) for run in running}
    return [
        run
        for run in running
        if (processes := seen[run.run_id]) and not any(_is_alive(pid, seen_s) for pid, seen_s in processes.items())
    ]


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
        pids = ", ".join(
            str(pid) for pid, seen_s in sorted(_processes(instance, run_id).items()) if _is_alive(pid, seen_s)
        )
        alive = f"its processes are {pids}" if pids else "none of its processes is alive here"
        holders.append(f"run {run_id[:8]} ({run.job_name}, {run.status.value}) holds it for {step_key}; {alive}")
    return f"{'; '.join(holders)}. If a run is dead, `mllm-assets slots free` ends it; Ctrl-C stops waiting."


def _runs_here(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether a run's pids are pids of this machine, so that they say whether it is alive.

    A launcher that looks after its runs itself (Kubernetes) starts each on a machine of its own. Other runs name their
    machine once they use the accelerator; before, those that a code server started are where that server is.
    """
    if instance.run_launcher.supports_check_run_worker_health:
        return False
    if host := run.tags.get(HOST_TAG):
        return host == socket.gethostname()
    server = json.loads(run.tags.get(GRPC_INFO_TAG, "{}"))
    return _is_this_machine(server.get("host") or "localhost")


def _is_this_machine(host: str) -> bool:
    try:
        address = socket.gethostbyname(host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))  # only an address of this machine can be bound
    except OSError:
        return False
    return True


def _processes(instance: dg.DagsterInstance, run_id: str) -> dict[int, float]:
    """Pid and Unix time of each process that the run's own events name: what executes it, and its step workers."""
    pids = {}
    for record in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        metadata = record.get_dagster_event().engine_event_data.metadata
        if "pid" in metadata:
            pids[int(str(metadata["pid"].value))] = record.timestamp
    return pids


def _is_alive(pid: int, seen_s: float) -> bool:
    """Whether the process that had this pid at a Unix time still runs; a later one with the same pid is another."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process: it is there
        pass
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        since_boot_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:  # no /proc: nothing more is known
        return True
    state, started_ticks = stat[0], int(stat[19])
    started_s = time.time() - since_boot_s + started_ticks / os.sysconf("SC_CLK_TCK")
    return state != "Z" and started_s <= seen_s + CLOCK_SLACK_S
