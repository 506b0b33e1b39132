"""Processes that a test looks at: any of them may end, or be a zombie, between two looks."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

WORKER = "mllm_assets.worker"


def command_line(process: psutil.Process) -> list[str]:
    """What a process runs: nothing, when it has ended or is a zombie."""
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # a ZombieProcess is a NoSuchProcess
        return process.cmdline()
    return []


def memory_bytes(process: psutil.Process) -> int:
    """What a process holds: nothing, when it has ended or is a zombie."""
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.memory_info().rss
    return 0


def those_that_run(module: str, processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Of some processes those that run a module (`python -m module`) or one below it."""
    return [process for process in processes if module in " ".join(command_line(process))]


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def processes_of(root: Path) -> list[psutil.Process]:
    """Every process that works in or for a project folder, whoever its parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            text = " ".join([process.cwd(), *process.cmdline(), process.environ().get("DAGSTER_HOME", "")])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if str(root) in text and process.pid != os.getpid():
            found.append(process)
    return found


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to each that still runs."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
