"""What a step takes of its machine: wall clock, CPU and GPU seconds, memory, and their price.

Standard library only. CPU time is that of this process and of all below it, ended or not; what a worker computed on a
GPU, and all that it took on another machine, comes with its result.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mllm_assets.worker.supervisor import tree

PREFIX = "cost_"


@dataclass(kw_only=True, slots=True)
class Usage:
    """What was taken; all but the peak adds up.

    Attributes:
        wall_s: Seconds from beginning to end.
        cpu_s: CPU seconds of all processes.
        gpu_s: Seconds for which a process held a GPU, for each GPU.
        peak_memory_gib: The largest process's main memory, or a GPU's if that was more.
        money: `wall_s` at the machine's price; 0 where no price is set.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    gpu_s: float = 0.0
    peak_memory_gib: float = 0.0
    money: float = 0.0

    def add(self, other: "Usage") -> None:
        """Add what another took."""
        self.wall_s += other.wall_s
        self.join(other)
        self.money += other.money

    def join(self, other: "Usage") -> None:
        """Add what another took at the same time."""
        self.cpu_s += other.cpu_s
        self.gpu_s += other.gpu_s
        self.peak_memory_gib = max(self.peak_memory_gib, other.peak_memory_gib)

    def as_metadata(self) -> dict[str, float]:
        """The figures by the names that they have in an asset's metadata; money only where there is a price."""
        values = {PREFIX + field.name: round(getattr(self, field.name), 4) for field in fields(self)}
        return values if self.money else {name: values[name] for name in values if name != PREFIX + "money"}

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> "Usage":
        """The figures of an asset's metadata; 0 for what it has not."""
        return cls(**{field.name: float(metadata.get(PREFIX + field.name, 0.0)) for field in fields(cls)})


_current: ContextVar[Usage | None] = ContextVar("usage", default=None)


@contextmanager
def measured(*, price_per_hour: float = 0.0) -> Iterator[Usage]:
    """Measure what the block takes; the figures are complete at its end, and may be read before."""
    _forget_peak()
    usage, began_s, cpu_s = Usage(), time.monotonic(), _cpu_seconds()
    token = _current.set(usage)
    try:
        yield usage
    finally:
        _current.reset(token)
        usage.wall_s += time.monotonic() - began_s
        usage.cpu_s += max(_cpu_seconds() - cpu_s, 0.0)
        usage.peak_memory_gib = max(usage.peak_memory_gib, peak_gib())
        usage.money += usage.wall_s / 3600 * price_per_hour


def report(payload: dict[str, float] | None, *, is_elsewhere: bool) -> None:
    """Count what a worker says that it took; its CPU time only if it was on another machine."""
    usage = _current.get()
    if usage is not None and payload is not None:
        took = Usage(**payload)
        usage.join(took if is_elsewhere else Usage(gpu_s=took.gpu_s, peak_memory_gib=took.peak_memory_gib))


def of_this_worker(began_s: float, num_processes: int) -> dict[str, float]:
    """What a worker took since `began_s` (monotonic), for `report` in its launcher.

    Ranks of one task do the same work: those beside the first are counted as it.
    """
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    on_gpu = cuda is not None and cuda.is_initialized()
    gpu_peak = cuda.max_memory_allocated() / 2**30 if cuda is not None and on_gpu else 0.0
    return {
        "cpu_s": _cpu_seconds() * num_processes,
        "gpu_s": (time.monotonic() - began_s) * num_processes * on_gpu,
        "peak_memory_gib": max(peak_gib(), gpu_peak),
    }


def peak_gib() -> float:
    """The most main memory that this process had, or one that it waited for where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _forget_peak() -> None:
    """Start a new peak of this process: steps of one run may share it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _cpu_seconds() -> float:
    times = os.times()
    return sum(times[:4]) + sum(map(_cpu_seconds_of, tree(os.getpid())))


def _cpu_seconds_of(pid: int) -> float:
    """CPU seconds of another process and of those that it waited for; 0 once it has ended."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, values[11:15])) / os.sysconf("SC_CLK_TCK")
