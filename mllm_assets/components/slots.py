"""Ends runs whose process was killed, so that the pool slots that they hold are free again."""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import dagster as dg
from dagster._core.events import EngineEventData
from dagster._core.storage.tags import GRPC_INFO_TAG

from mllm_assets.components.instance.step_forks import run_pid
from mllm_assets.process_id import ProcessId, pid_is_free

PROCESSES = "processes"  # of an engine event's metadata: their ids
HOST_TAG = ".dagster/mllm_assets_host"  # of a run that has used the accelerator: its machine; the UI hides the tag
RUN_TAG = "run"  # of what `mllm-assets run` started, or a launchpad with other values: `emoji_sft`, see `run_tags`
IN_PROGRESS = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def run_tags(name: str, overrides: Mapping[str, Any]) -> dict[str, str]:
    """What tells a run from others in the list of runs: a tag for each changed value, for a longer one would be cut."""
    return {RUN_TAG: name} | {key: v if isinstance(v, str) else json.dumps(v) for key, v in overrides.items()}


def tag_host(instance: dg.DagsterInstance, run_id: str) -> None:
    """Tag a run with its machine: on another one that shares the instance its pids mean nothing."""
    instance.add_run_tags(run_id, {HOST_TAG: socket.gethostname()})


def record_processes(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """Write the ids of this process, and of the run's if that is another one, into the run's events.

    Dagster's own events have only pids and wall-clock times, which another process may have later.
    """
    named = {pid for pid, _ in _processes(instance, run.run_id)}
    known = [ProcessId.of(pid) for pid in (os.getpid(), run_pid()) if pid == os.getpid() or pid in named]
    metadata = {PROCESSES: dg.MetadataValue.json([asdict(process) for process in known if process])}
    instance.report_engine_event("Recorded who the run's processes are.", run, EngineEventData(metadata))


def find_dead_runs(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Runs of this machine that count as running although all their processes have ended."""
    running = [run for run in instance.get_runs(dg.RunsFilter(statuses=IN_PROGRESS)) if _runs_here(instance, run)]
    seen = {run.run_id: list(_processes(instance, run.run_id)) for run in running}
    return [
        run
        for run in running
        if (processes := seen[run.run_id]) and all(_has_ended(pid, process) for pid, process in processes)
    ]


def find_leftover_holders(instance: dg.DagsterInstance) -> list[str]:
    """Ids of runs that hold a pool's slot although they have ended, or are no longer in the instance."""
    storage = instance.event_log_storage
    slots = [
        slot for pool in storage.get_concurrency_keys() for slot in storage.get_concurrency_info(pool).claimed_slots
    ]
    runs = {slot.run_id: instance.get_run_by_id(slot.run_id) for slot in slots}
    return [run_id for run_id, run in runs.items() if run is None or run.is_finished]


def end_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Report this machine's dead runs as failed, free their slots and those of runs that have ended; return the ids.

    `kill -9` of a run leaves it "started" for ever, and its slot of the pool `gpu` taken: the next run would wait.
    """
    dead = find_dead_runs(instance)
    for run in dead:
        instance.report_run_failed(run, "Its process is gone (killed, or the machine was restarted).")
    freed = list(dict.fromkeys([*(run.run_id for run in dead), *find_leftover_holders(instance)]))
    for run_id in freed:
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    return freed


def describe_holders(instance: dg.DagsterInstance, pool: str) -> str:
    """Who holds a pool's slots, and how a user who waits for one can free it."""
    slots = instance.event_log_storage.get_concurrency_info(pool).claimed_slots
    if not slots:
        return "it is being freed."
    holders = []
    for run_id, step_key in sorted({(slot.run_id, slot.step_key) for slot in slots}):
        run = instance.get_run_by_id(run_id)
        if run is None:
            holders.append(f"run {run_id[:8]}, which is no longer in this instance, holds it")
            continue
        processes = sorted({pid for pid, process in _processes(instance, run_id) if not _has_ended(pid, process)})
        pids = ", ".join(map(str, processes))
        alive = f"its processes are {pids}" if pids else "none of its processes is alive here"
        holders.append(f"run {run_id[:8]} ({run.job_name}, {run.status.value}) holds it for {step_key}; {alive}")
    return f"{'; '.join(holders)}. If a run is dead, `mllm-assets slots free` ends it; Ctrl-C stops waiting."


def _runs_here(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether a run's pids are of this machine, so that they show whether it is alive.

    A launcher that monitors its runs itself (Kubernetes) starts each on its own machine. Other runs are tagged with
    their machine once they use the accelerator; before that, a run is on the machine of its code server.
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


def _processes(instance: dg.DagsterInstance, run_id: str) -> Iterator[tuple[int, ProcessId | None]]:
    """Each process that the run's events name, the run worker and its step workers, with its id if recorded."""
    pids: set[int] = set()
    known: list[ProcessId] = []
    for record in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        metadata = record.get_dagster_event().engine_event_data.metadata
        if "pid" in metadata:
            pids.add(int(str(metadata["pid"].value)))
        if isinstance(recorded := metadata.get(PROCESSES), dg.JsonMetadataValue):
            assert isinstance(recorded.data, list)
            known += [ProcessId(**values) for values in recorded.data]
    yield from ((process.pid, process) for process in known)
    yield from ((pid, None) for pid in pids - {process.pid for process in known})


def _has_ended(pid: int, process: ProcessId | None) -> bool:
    return pid_is_free(pid) if process is None else process.has_ended()
