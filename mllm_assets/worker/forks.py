"""One process that loads the libraries once and forks a worker for each task of a launcher.

launcher -> supervisor -> this process -> a worker for each task (-> loader processes). The launcher keeps it from one
task to the next, so that the steps of a run import torch and transformers once: 8 s of CPU time for each further one.
It ends with its launcher, and when no task came for `IDLE_S`. Linux only; ranks of torchrun start as they always do.

Before a fork no thread was started and no device was touched. Where an import did touch CUDA, which a fork cannot use
then, the worker starts as a new program. The variables and the folder are those that the process began with: a task
that wants others gets another process. A task that quantizes is not forked, for it alone imports bitsandbytes.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_assets.worker import interrupts, supervisor
from mllm_assets.worker.tasks import Task

PIPES = "DAGSTER_PIPES_"  # variables with this prefix are of one task, and nothing reads them on import
IDLE_S = 60.0
TAKEN = b"taken"
LOAD = "load"
OURS = "mllm_assets."  # the process of any other task ends with it
MESSAGE_BYTES = 100_000


@dataclass(kw_only=True)
class Forks:
    """The launcher's side: a process that runs tasks, one at a time.

    Attributes:
        supervisor: Whose child it is; a closed stdin ends both.
        conditions: What must be the same for another task: variables, folder, and the seconds of grace.
        taken: Whether it has begun with the task that it was sent last.
    """

    supervisor: subprocess.Popen[bytes]
    channel: socket.socket
    mark: str
    conditions: object
    launcher: int = field(default_factory=os.getpid)
    taken: bool = False

    def send(self, task: Task[Any], task_path: Path, result_path: Path, env: Mapping[str, str]) -> None:
        """Hand it a task, with this process's stdout and stderr; where it has ended, `poll` tells."""
        self.taken = False
        message = json.dumps([task.entry, str(task_path), str(result_path), dict(env)]).encode()
        with suppress(ConnectionError):
            socket.send_fds(self.channel, [message], [1, 2])

    def load(self, entries: Sequence[str]) -> None:
        """Let it import what tasks of these entries need, ahead of the first one."""
        with suppress(ConnectionError):
            self.channel.send(json.dumps({LOAD: entries}).encode())

    def takes(self) -> bool:
        """Wait until it has begun with the task; False where it has ended instead. A held interrupt is raised."""
        while not self.taken:
            if self.poll() is not None:
                return False
            time.sleep(0.005)
            interrupts.raise_held()
        return True

    def poll(self) -> int | None:
        """The exit code of the task's worker, or of the whole if that ended; None while it runs."""
        while select.select([self.channel], [], [], 0)[0]:
            try:
                message = self.channel.recv(100)
            except ConnectionError:
                message = b""
            if not message:
                return self.supervisor.wait()
            if message != TAKEN:
                return int(message)
            self.taken = True
        return self.supervisor.poll()

    def close(self) -> None:
        """Let go of it, in a fork of the launcher too."""
        self.channel.close()
        if self.supervisor.stdin is not None:
            self.supervisor.stdin.close()


_kept: list[Forks] = []


def take(conditions: object) -> Forks | None:
    """The process that this launcher kept, if it is one for these conditions; any other is ended."""
    forks = _kept.pop() if _kept else None
    if forks is None:
        return None
    if forks.launcher == os.getpid() and forks.conditions == conditions and forks.supervisor.poll() is None:
        return forks
    forks.close()
    if forks.launcher == os.getpid():
        forks.supervisor.wait()
    return None


def kept() -> Forks | None:
    """The process that this launcher keeps, if any."""
    return _kept[-1] if _kept else None


def keep(forks: Forks) -> None:
    """Keep it for the launcher's next task."""
    _kept.append(forks)


@atexit.register
def end_kept() -> None:
    """End what was kept: more than one process, if tasks ran in several threads."""
    while _kept:
        take(None)


def can_fork(task: Task[Any], env: Mapping[str, str]) -> bool:
    """Whether a task runs in a fork."""
    own = sum(len(name) + len(value) for name, value in env.items() if name.startswith(PIPES))
    return supervisor.IS_LINUX and task.accelerator.num_processes == 1 and not task.quantizes and own < MESSAGE_BYTES


def serve(load: Callable[[str], object], run: Callable[[Path, Path], int]) -> int:
    """The process's side: run the tasks that come, and end when none does. Only a task's fork returns: its exit code.

    Args:
        load: Imports what the task's entry needs.
        run: Runs the task of the first file, writes its outcome to the second and returns the exit code.
    """
    supervisor.adopt_orphans()  # what a worker leaves behind
    channel = socket.socket(fileno=int(os.environ.pop(supervisor.TASKS)))
    ends_with, has_worker = 0, False

    def end(number: int, _: object) -> None:
        nonlocal ends_with
        ends_with = 128 + number
        if not has_worker:
            os._exit(ends_with)

    signal.signal(signal.SIGTERM, end)
    while select.select([channel], [], [], IDLE_S)[0]:
        message, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES * 2, 2)
        if not message:
            break
        said = json.loads(message)
        entries = said[LOAD] if LOAD in said else said[:1]
        if LOAD not in said:
            channel.send(TAKEN)
        for entry in entries:
            if entry.startswith(OURS):
                with suppress(Exception):  # the worker meets it again, and says it
                    load(entry)
        if LOAD in said:
            continue
        _, task_path, result_path, env = said
        gc.freeze()  # pages that the collector writes to are no longer shared
        parent, has_worker = os.getpid(), True
        pid = os.fork()
        if pid == 0:
            channel.close()
            _begin(parent, descriptors, env, [task_path, result_path])
            return run(Path(task_path), Path(result_path))
        for descriptor in descriptors:
            os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        _end_leftovers()
        with suppress(OSError):
            channel.send(str(os.waitstatus_to_exitcode(status)).encode())
        has_worker = False
        if ends_with:
            break
    os._exit(ends_with)


def _begin(parent: int, descriptors: list[int], env: Mapping[str, str], paths: list[str]) -> None:
    """Make a fork what a process of its own would be."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    supervisor.die_with_parent()
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    for number, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # pyright: ignore[reportAttributeAccessIssue]
    os.environ.update(env)
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and torch.cuda._is_in_bad_fork():
        os.execv(sys.executable, [sys.executable, "-m", "mllm_assets.worker", *paths])
    if numpy is not None:
        numpy.random.seed()  # else each task would draw the same numbers


def _end_leftovers() -> None:
    while left := supervisor.tree(os.getpid()):
        supervisor.send(left, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)
