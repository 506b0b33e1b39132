"""The worker process: `python -m mllm_assets.worker TASK.json RESULT.json`.

Only here is torch loaded, and only by the tasks that need it.
"""

import atexit
import gc
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mllm_assets.artifacts import lock_path, write_json_atomic
from mllm_assets.errors import MachineError, MllmAssetsError
from mllm_assets.plugins import MODULES, counting_as_missing, load_plugins, resolve
from mllm_assets.redaction import redacted, redacted_output
from mllm_assets.worker import forks
from mllm_assets.worker.protocol import (
    EXIT_OK,
    EXIT_USER_ERROR,
    LOST_PEER,
    Reporter,
    error_payload,
    is_first_rank,
    is_lost_peer,
    open_reporter,
)
from mllm_assets.worker.supervisor import die_with_parent
from mllm_assets.worker.tasks import Task, encode, from_json
from mllm_assets.worker.usage import of_this_worker

EXIT_CRASHED = 1  # as Python ends after an exception
LOCK_WAIT_S = 5.0  # a worker that is being ended may still hold it
# What libraries import if it is installed, with the CPU seconds that it takes: transformers' Trainer to recognise
# tables of `datasets` (1.2, with its pandas), transformers for the losses of object detection (0.2), accelerate to
# configure SageMaker (0.1; both together 0.4 of 3.6)
NOT_NEEDED = ("datasets", "scipy", "boto3")


def refuse_hub_kernels() -> None:
    """Keep bitsandbytes, which PEFT imports if installed, from running code of the Hub. Call it before PEFT loads.

    On CPUs with AVX512-BF16 it fetches a kernel with the package `kernels`, and advises to install that if missing.
    """
    MODULES.setdefault("kernels", None)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def find_function(entry: str) -> Callable[[Task[Any], Reporter], Any]:
    """Import the `module:function` of a task; for one of this package without what libraries import without a need.

    What this package does with those modules it imports on use.
    """
    # The collector would look again and again through the objects of the libraries, which all stay: 4.7 s instead of
    # 3.5 s of CPU time until `mllm_assets.evaluation.predict` is loaded, for 8 MiB
    gc.disable()
    try:
        with counting_as_missing(NOT_NEEDED if entry.startswith(forks.OURS) else ()):
            return resolve(entry)
    finally:
        gc.enable()


def run(task: Task[Any], result_path: Path) -> None:
    """Run one task and write its result."""
    began_s = time.monotonic()
    with open_reporter() as reporter, _alone_in(task.lock_dir):
        result = find_function(task.entry)(task, reporter)
    if is_first_rank():
        took = of_this_worker(began_s, task.accelerator.num_processes)
        write_json_atomic(result_path, {"result": encode(result), "usage": took})


@contextmanager
def _alone_in(run_dir: Path | None) -> Iterator[None]:
    """Hold a run's lock; the kernel gives it back however this process ends."""
    if run_dir is None or not is_first_rank():
        yield
        return
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path(run_dir))
    try:
        lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout:
        raise MachineError(
            f"Another process is training {run_dir}. Wait for it, or stop it; then the same command resumes."
        ) from None
    try:
        yield
    finally:
        lock.release()


def main() -> None:
    """Entry point of the worker process."""
    refuse_hub_kernels()
    die_with_parent()  # a rank of torchrun too, whose parent is not the supervisor
    match sys.argv[1:]:
        case ["--fork"]:
            atexit.register(end_quietly)  # first, so that it is called last
            hide_bitsandbytes()
            sys.exit(forks.serve(find_function, run_redacted))
        case [task_path, result_path]:
            sys.exit(run_redacted(Path(task_path), Path(result_path)))


def end_quietly() -> None:
    """Say nothing more.

    What was frozen before the fork is not freed at its end, and duckdb's binding would name it: 60 lines of "nanobind:
    leaked" after each task. To free it takes 1.1 s of CPU time.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def hide_bitsandbytes() -> None:
    """Spare 1.2 s of CPU time: PEFT would import it."""
    MODULES.setdefault("bitsandbytes", None)


def run_redacted(task_path: Path, result_path: Path) -> int:
    with redacted_output():
        return run_file(task_path, result_path)


def run_file(task_path: Path, result_path: Path) -> int:
    """Run the task in a file and write its outcome. Returns the exit code."""
    try:
        load_plugins()  # a recipe may name the turn format of one
        task = from_json(json.loads(task_path.read_text(encoding="utf-8")))
        if not task.quantizes:
            hide_bitsandbytes()
        run(task, result_path)
        return EXIT_OK
    except MllmAssetsError as error:
        # any rank may have found it; the file is replaced atomically, so the last one wins
        write_json_atomic(result_path, {"error": error_payload(error)})
        return EXIT_USER_ERROR
    except BaseException as crash:  # Ctrl-C and sys.exit within the libraries too: the launcher must see them
        if not result_path.exists():  # an error that the user can fix in one rank matters more than the others' crash
            found = {"lost": LOST_PEER} if is_lost_peer(crash) else {"traceback": redacted(traceback.format_exc())}
            write_json_atomic(result_path, found)
        if not isinstance(crash, Exception):
            raise
        traceback.print_exc()  # here, where output is redacted
        return EXIT_CRASHED
