"""The process that does the heavy work: `python -m mllm_assets.worker REQUEST.json RESULT.json`.

Only here does torch get loaded, and only by the task that needs it.
"""

import gc
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mllm_assets.artifacts import write_json_atomic
from mllm_assets.errors import MachineError, MllmAssetsError
from mllm_assets.hub_kernels import leave_out_bitsandbytes, refuse_hub_kernels
from mllm_assets.redaction import redacted, redacted_output
from mllm_assets.training.protocol import EXIT_OK, EXIT_USER_ERROR, Reporter, error_payload, open_reporter
from mllm_assets.training.ranks import is_first_rank
from mllm_assets.training.supervisor import die_with_parent

Task = Callable[[dict[str, Any], Reporter], dict[str, Any]]

EXIT_CRASHED = 1  # as Python ends after an exception
LOCK_WAIT_S = 5.0  # a worker that is being ended may still hold it

TASKS = {
    "build_pretrained": "mllm_assets.training.tiny_gemma:build_task",
    "train": "mllm_assets.training.engine:train_task",
    "vision_features": "mllm_assets.training.features:features_task",
    "evaluate": "mllm_assets.evaluation.predict:evaluate_task",
    "release": "mllm_assets.evaluation.release:verify_task",
}


def find_task(name: str) -> Task:
    """Import the function of one task. A dotted `module:function` names one outside the table."""
    module, _, function = TASKS.get(name, name).partition(":")
    if not function:
        raise ValueError(f"Unknown task {name!r}: expected one of {', '.join(TASKS)}.")
    # The collector would look again and again through the objects of the libraries, which all stay: 4.7 s in place of
    # 3.5 s of CPU time until `mllm_assets.evaluation.predict` is loaded, for 8 MiB
    gc.disable()
    try:
        return getattr(importlib.import_module(module), function)
    finally:
        gc.enable()


def run(request: dict[str, Any], result_path: Path) -> int:
    """Run one task and write its outcome. Returns the exit code; a crash is raised, with its traceback."""
    with open_reporter() as reporter:
        try:
            with _alone_in_run_directory(request):
                result = find_task(request["task"])(request, reporter)
        except MllmAssetsError as error:
            # Any rank may be the one that found it: the file is replaced in one step, so the last one wins
            write_json_atomic(result_path, {"error": error_payload(error)})
            return EXIT_USER_ERROR
    if is_first_rank():
        write_json_atomic(result_path, {"result": result})
    return EXIT_OK


@contextmanager
def _alone_in_run_directory(request: dict[str, Any]) -> Iterator[None]:
    """Hold the run's lock; the kernel gives it back however this process ends."""
    if "run_dir" not in request or not is_first_rank():
        yield
        return
    run_dir = Path(request["run_dir"])
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir.with_name(f".{run_dir.name}.lock"))
    try:
        lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout:
        raise MachineError(
            f"Another process is training {run_dir}. Wait for it, or stop it; then the same command goes on from it."
        ) from None
    try:
        yield
    finally:
        lock.release()


def main() -> None:
    """Entry point of the worker process."""
    refuse_hub_kernels()
    die_with_parent()  # a rank of torchrun too, whose parent is not the supervisor
    request_path, result_path = (Path(argument) for argument in sys.argv[1:3])
    with redacted_output():
        code = _run_file(request_path, result_path)
    sys.exit(code)


def _run_file(request_path: Path, result_path: Path) -> int:
    try:
        request = json.loads(request_path.read_text(encoding="utf-8"))
        if not request.get("recipe", {}).get("quantization_bit"):
            leave_out_bitsandbytes()
        return run(request, result_path)
    except BaseException as crash:  # Ctrl-C and sys.exit within the libraries too: the launcher must hear of them
        if not result_path.exists():  # what a person can mend in one rank counts for more than the others' fall
            write_json_atomic(result_path, {"traceback": redacted(traceback.format_exc())})
        if not isinstance(crash, Exception):
            raise
        traceback.print_exc()  # here, where what is printed is redacted
        return EXIT_CRASHED


if __name__ == "__main__":
    main()
