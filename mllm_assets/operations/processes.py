"""Orphaned processes, and those that lock what others wait for. Linux only: they are read from /proc."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mllm_assets.operations.findings import Finding
from mllm_assets.worker import supervisor
from mllm_assets.worker.supervisor import MARK

PROC = Path("/proc")
SUPERVISOR = (supervisor.__name__, os.path.join("worker", "supervisor.py"))  # as a module, and as a plain file
TRANSACTION_S = 2.0  # a transaction of ours takes less


def check_orphans() -> Finding:
    """Workers whose supervisor is gone: they hold memory and the GPU, and nothing waits for them."""
    if sys.platform != "linux":
        return Finding("processes", "ok", "not checked on this system: ps aux | grep mllm_assets.worker")
    workers: dict[str, list[int]] = {}
    supervised = set()
    for pid in _pids():
        mark = _environment(pid).get(MARK)
        if mark is not None:
            workers.setdefault(mark, []).append(pid)
            if any(part in SUPERVISOR or part.endswith(SUPERVISOR[1]) for part in command_of(pid)):
                supervised.add(mark)
    orphans = {pid: command_of(pid) for mark, pids in workers.items() if mark not in supervised for pid in pids}
    orphans = {pid: command for pid, command in orphans.items() if command}  # a zombie has none
    if not orphans:
        return Finding("processes", "ok", f"{len(supervised)} jobs with their supervisors, no orphan")
    listed = "; ".join(f"PID {pid}: {_shown(command)}" for pid, command in orphans.items())
    step = f"kill -9 {' '.join(str(pid) for pid in orphans)}"
    return Finding("processes", "warn", f"without a supervisor: {listed}", step)


def check_database(path: Path, *, sleep: Callable[[float], None] = time.sleep) -> Finding:
    """The processes that keep the quality database open: all others wait for them."""
    check = "quality database"
    if not path.exists():
        return Finding(check, "ok", "none yet; the first sample_quality makes it")
    before = _holders(path)
    if before:
        sleep(TRANSACTION_S)
    holders = [pid for pid in before if pid in _holders(path)]
    if not holders:
        return Finding(check, "ok", f"{path.stat().st_size / 2**20:.1f} MiB, not locked")
    listed = "; ".join(f"PID {pid}: {_shown(command_of(pid))}" for pid in holders)
    step = f"Close it there, or end it: kill {' '.join(str(pid) for pid in holders)}"
    return Finding(check, "warn", f"held for more than {TRANSACTION_S:g} s by {listed}", step)


def command_of(pid: int) -> list[str]:
    """A process's command line; empty where it has ended or belongs to another user."""
    return [part for part in _read(PROC / str(pid) / "cmdline").split("\0") if part]


def _holders(path: Path) -> list[int]:
    wanted = {str(path.resolve()), f"{path.resolve()}.lock"}  # the lock's file is open only while it is held
    return [pid for pid in _pids() if wanted & _open_files(pid)]


def _open_files(pid: int) -> set[str]:
    found = set()
    try:
        for name in os.listdir(PROC / str(pid) / "fd"):
            with suppress(FileNotFoundError):  # closed meanwhile
                found.add(os.readlink(PROC / str(pid) / "fd" / name))
    except OSError:  # the process has ended, or belongs to another user
        pass
    return found


def _pids() -> list[int]:
    found = [int(name) for name in os.listdir(PROC) if name.isdecimal()] if PROC.is_dir() else []
    return sorted(pid for pid in found if pid != os.getpid())


def _environment(pid: int) -> dict[str, str]:
    pairs = (part.partition("=") for part in _read(PROC / str(pid) / "environ").split("\0"))
    return {name: value for name, _, value in pairs}


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def _shown(command: list[str]) -> str:
    text = " ".join(command)
    return text if len(text) <= 100 else f"{text[:97]}..."
