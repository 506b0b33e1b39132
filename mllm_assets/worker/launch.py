"""Run one worker task in a process tree of its own, and leave nothing of it behind.

Launcher -> supervisor -> worker (-> ranks -> loader processes). The launcher holds the supervisor's stdin open. Where
one process computes, the worker is a fork of a process that stays for the launcher's next task (`forks`).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from mllm_assets.redaction import redacted
from mllm_assets.worker import forks, interrupts, supervisor, usage
from mllm_assets.worker.protocol import EXIT_OK, EXIT_USER_ERROR, error_from_payload
from mllm_assets.worker.tasks import Accelerator, Task, result_from_json, to_json

POLL_S = 0.2
# Threads that spin long while they wait starve each other on a busy machine; those that never spin are slow on a quiet
# one. 40 steps of the emoji recipe with 2 threads on 2 cores, quiet / next to two busy processes: libgomp's default
# 3.9 s / above 50 s, OMP_WAIT_POLICY=PASSIVE 5.5 / 17.8 s, 1000 turns 3.7 / 19.1 s.
SPIN, SPIN_TURNS = "GOMP_SPINCOUNT", "1000"
R = TypeVar("R")


class WorkerCrashed(Exception):
    """The worker ended without a result, for a reason that is not the user's: a new attempt resumes.

    Attributes:
        is_transient: It was killed, or its machine was lost, so that another attempt may well succeed. An unforeseen
            exception would be raised again.
    """

    def __init__(self, message: str, *, is_transient: bool = True) -> None:
        super().__init__(redacted(message))
        self.is_transient = is_transient


def run_worker(
    task: Task[R],
    *,
    env: Mapping[str, str] | None = None,
    on_poll: Callable[[], None] | None = None,
    grace_s: float = 10.0,
) -> R:
    """Run one task and return its result.

    Args:
        task: The task.
        env: Variables on top of this process's.
        on_poll: Called about five times a second; an exception that it raises cancels the task.
        grace_s: Seconds between SIGTERM and SIGKILL.

    Raises:
        MllmAssetsError: What the worker found wrong, as the class that it raised.
        WorkerCrashed: It ended otherwise.
        BaseException: Whatever interrupted the wait; the task's processes are gone by then.
    """
    with interrupts.held_back(), tempfile.TemporaryDirectory(prefix="mllm_assets_") as folder:
        task_path, result_path = Path(folder, "task.json"), Path(folder, "result.json")
        task_path.write_text(json.dumps(to_json(task)), encoding="utf-8")
        env = {**thread_variables(task.accelerator), **(env or {})}
        if forks.can_fork(task, env):
            code = _run_fork(task, (task_path, result_path), env, on_poll, grace_s)
        else:
            code = _run_command(worker_command(task.accelerator, task_path, result_path), env, on_poll, grace_s)
        return read_outcome(task, code, result_path)


def load_ahead(accelerator: Accelerator, entries: Sequence[str], *, grace_s: float) -> None:
    """Let the process that workers are forks of load its libraries while this one does something else."""
    if supervisor.IS_LINUX and accelerator.num_processes == 1 and forks.kept() is None:
        variables = {**os.environ, **thread_variables(accelerator)}
        waiting = _start_forks(variables, (variables, os.getcwd(), grace_s), grace_s)
        waiting.load(entries)
        forks.keep(waiting)


def _run_command(command: list[str], env: Mapping[str, str], on_poll: Callable[[], None] | None, grace_s: float) -> int:
    """Run a worker of its own; returns its exit code."""
    mark = uuid.uuid4().hex
    process = _start(command, {**os.environ, **env, supervisor.MARK: mark}, grace_s)
    try:
        _wait(process.poll, on_poll)
    finally:
        _end(process, mark, grace_s)
        _end_line(process.returncode)
    return process.returncode


def _run_fork(
    task: Task[R],
    paths: tuple[Path, Path],
    env: Mapping[str, str],
    on_poll: Callable[[], None] | None,
    grace_s: float,
) -> int:
    """Run a fork of the process that loads the libraries once; returns its exit code."""
    own = {name: value for name, value in env.items() if name.startswith(forks.PIPES)}
    variables = {**os.environ, **{name: value for name, value in env.items() if name not in own}}
    conditions = (variables, os.getcwd(), grace_s)
    code, kept = None, forks.take(conditions)
    worker = kept or _start_forks(variables, conditions, grace_s)
    try:
        worker.send(task, *paths, own)
        if kept and not kept.takes():  # its end was on its way
            kept.close()
            worker = _start_forks(variables, conditions, grace_s)
            worker.send(task, *paths, own)
        code = _wait(worker.poll, on_poll)
        return code
    finally:
        if code in (EXIT_OK, EXIT_USER_ERROR) and task.entry.startswith(forks.OURS):
            forks.keep(worker)
        else:
            worker.channel.close()
            _end(worker.supervisor, worker.mark, grace_s)
            _end_line(code)


def _start_forks(variables: Mapping[str, str], conditions: object, grace_s: float) -> forks.Forks:
    mark = uuid.uuid4().hex
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        env = {**variables, supervisor.MARK: mark, supervisor.TASKS: str(theirs.fileno())}
        command = [sys.executable, "-m", "mllm_assets.worker", "--fork"]
        process = _start(command, env, grace_s, hand_on=(theirs.fileno(),))
    return forks.Forks(supervisor=process, channel=ours, mark=mark, conditions=conditions)


def _start(
    command: list[str], env: Mapping[str, str], grace_s: float, *, hand_on: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    """Start the supervisor of a command."""
    return subprocess.Popen(
        [sys.executable, supervisor.__file__, str(grace_s), "-", *command],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches the launcher only, which then ends the tree in order
        env=env,
        pass_fds=hand_on,
    )


def _wait(poll: Callable[[], int | None], on_poll: Callable[[], None] | None) -> int:
    while (code := poll()) is None:
        if on_poll is not None:
            on_poll()
        time.sleep(POLL_S)
        interrupts.raise_held()
    return code


def _end_line(code: int | None) -> None:
    if code not in (EXIT_OK, EXIT_USER_ERROR):
        print(file=sys.stderr)  # a worker that was ended could not end the line of its progress bar


def worker_command(
    accelerator: Accelerator, task_path: Path, result_path: Path, *, python: str = sys.executable
) -> list[str]:
    """The worker's command line: plain Python, or torchrun for more than one process.

    Source:
        torchrun is what `accelerate launch` runs for GPUs; for CPUs that starts one process whatever was asked
        (accelerate 1.15, `simple_launcher`), and it reads a config file of the user's that the run's name does not
        cover. transformers' Trainer takes its ranks from torchrun's variables.
    """
    command = [python]
    if accelerator.num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={accelerator.num_processes}"]
        command += [f"--log-dir={task_path.parent}"]  # else a folder stays in the system's for temporary files
    return [*command, "-m", "mllm_assets.worker", str(task_path), str(result_path)]


def thread_variables(accelerator: Accelerator) -> dict[str, str]:
    """Environment variables for the CPU threads of a worker."""
    variables = {SPIN: os.environ.get(SPIN, SPIN_TURNS)}
    if accelerator.num_threads:
        variables |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(accelerator.num_threads))
    return variables


def _end(process: subprocess.Popen[bytes], mark: str, grace_s: float) -> None:
    """Close the supervisor's stdin and wait for it; a second interrupt does not cut the wait short."""
    assert process.stdin is not None
    process.stdin.close()
    deadline = time.monotonic() + grace_s + 10
    interrupt: BaseException | None = None
    while process.poll() is None and time.monotonic() < deadline:
        try:
            process.wait(max(deadline - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            break
        except BaseException as error:  # e.g. a second Ctrl-C or Dagster's interrupt
            interrupt = error
    if process.poll() is None:
        process.kill()
        process.wait()
    # A supervisor that was killed itself has left its tree's orphans
    if process.returncode < 0:
        while stragglers := supervisor.marked(mark):
            supervisor.send(stragglers, signal.SIGKILL)
            time.sleep(0.02)
    if interrupt is not None:
        raise interrupt


def read_outcome(task: Task[R], code: int, result_path: Path, *, is_elsewhere: bool = False) -> R:
    """Return what a worker wrote before it ended with `code` (128 + number or below 0 for a signal).

    What it took counts for the step that asks; all of it if it ran on another machine.

    Raises:
        MllmAssetsError: What it found wrong.
        WorkerCrashed: It wrote nothing.
    """
    outcome = json.loads(result_path.read_text(encoding="utf-8")) if result_path.exists() else {}
    if "error" in outcome:
        raise error_from_payload(outcome["error"])
    if code == EXIT_OK and "result" in outcome:
        usage.report(outcome.get("usage"), is_elsewhere=is_elsewhere)
        return result_from_json(task, outcome["result"])
    if "lost" in outcome:
        raise WorkerCrashed(
            f"The worker of task {task.name!r} {outcome['lost']} What was done is kept: run it again and it goes on."
        )
    number = -code if code < 0 else code - 128 if code > 128 else None
    if number is not None:
        hint = " The system may have run out of memory: lower the batch size." if number == signal.SIGKILL else ""
        how = f"was ended by signal {number} ({signal.strsignal(number)}).{hint}"
    else:
        how = f"ended with exit code {code} and no result."
    trace = f"\n{outcome['traceback']}" if "traceback" in outcome else ""
    raise WorkerCrashed(
        f"The worker of task {task.name!r} {how} What was done is kept: run it again and it goes on.{trace}",
        # a rank of torchrun that is killed leaves an exit code, as an exception does, but no traceback of its own
        is_transient="traceback" not in outcome,
    )
