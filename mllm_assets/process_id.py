"""Process identities and elapsed times that do not depend on the wall clock.

A pid is reused, and the wall clock is set by NTP, a user, or a laptop that wakes up; the kernel's count since it
started is not. So a process is its pid with the moment of its start on that count, and the boot that it counts from.

Not covered: on other systems than Linux a process is distinguished from a later one with its pid only to the second.
"""

import functools
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # the first goes on while the machine sleeps


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessId:
    """One process, distinguished from every other one of any machine and any boot."""

    machine: str  # `/etc/machine-id`, or the host's name
    boot: str  # empty if not known
    namespace: str  # of the pid: each container has its own
    pid: int
    started: str  # on the kernel's own count; empty if not known

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """The process that has this pid here and now, or None."""
        started = _started(pid)
        if started is None:
            return None
        return cls(machine=_machine(), boot=boot_id(), namespace=_namespace(), pid=pid, started=started)

    def has_ended(self) -> bool:
        """Whether it is certain that the process has ended; never certain for another machine or container."""
        if (self.machine, self.namespace) != (_machine(), _namespace()):
            return False
        if self.boot != boot_id():
            return True
        found = _started(self.pid)
        return found is None or bool(found and self.started and found != self.started)


def pid_is_free(pid: int) -> bool:
    """Whether no process has this pid: all that is certain of a process whose start was not recorded."""
    return _started(pid) is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """When something happened: on the kernel's count, and on the wall clock for after a restart of the machine."""

    boot: str
    since_boot_s: float
    unix_s: float

    @classmethod
    def now(cls) -> Self:
        return cls(boot=boot_id(), since_boot_s=time.clock_gettime(_BOOT_CLOCK), unix_s=time.time())

    @classmethod
    def from_dict(cls, values: Any) -> Self | None:
        """Read the result of `asdict`; None if it is something else."""
        try:
            return cls(boot=values["boot"], since_boot_s=values["since_boot_s"], unix_s=values["unix_s"])
        except (KeyError, TypeError):
            return None

    def anchored(self) -> Self:
        """The same moment on this boot's count, so that no later step of the wall clock moves it."""
        now, elapsed_s = Moment.now(), self.elapsed_s()
        return type(self)(boot=now.boot, since_boot_s=now.since_boot_s - elapsed_s, unix_s=now.unix_s - elapsed_s)

    def elapsed_s(self) -> float:
        """Seconds since then; a moment in the future counts as now."""
        now = Moment.now()
        if self.boot and self.boot == now.boot:
            return now.since_boot_s - self.since_boot_s
        return max(0.0, now.unix_s - self.unix_s)


@functools.cache
def boot_id() -> str:
    """The id of the current boot; empty if the system has none."""
    if sys.platform == "darwin":
        return _output(["sysctl", "-n", "kern.bootsessionuuid"])
    return _text("/proc/sys/kernel/random/boot_id")


@functools.cache
def _machine() -> str:
    return _text("/etc/machine-id") or socket.gethostname()


@functools.cache
def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started; None if it does not exist, or has ended and waits for its parent."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # another user's process: it exists
        pass
    if stat := _text(f"/proc/{pid}/stat").rpartition(")")[2].split():  # after the name, which may hold anything
        return None if stat[0] in "ZX" else stat[19]
    if os.path.isdir("/proc/self"):
        return ""
    return _output(["ps", "-o", "lstart=", "-p", str(pid)])


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _output(command: list[str]) -> str:
    plain = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
    try:
        return subprocess.run(command, env=plain, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
