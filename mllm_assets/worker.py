"""The process that does the heavy work: `python -m mllm_assets.worker REQUEST.json RESULT.json`.

Only here does torch get loaded, and only by the task that needs it.
"""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import write_json_atomic
from mllm_assets.errors import MllmAssetsError
from mllm_assets.training.protocol import EXIT_OK, EXIT_USER_ERROR, Reporter, error_payload, open_reporter
from mllm_assets.training.supervisor import die_with_parent

Task = Callable[[dict[str, Any], Reporter], dict[str, Any]]

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
    return getattr(importlib.import_module(module), function)


def run(request: dict[str, Any], result_path: Path) -> int:
    """Run one task and write its outcome. Returns the exit code; a crash is raised, with its traceback."""
    with open_reporter() as reporter:
        try:
            result = find_task(request["task"])(request, reporter)
        except MllmAssetsError as error:
            # Any rank may be the one that found it: the file is replaced in one step, so the last one wins
            write_json_atomic(result_path, {"error": error_payload(error)})
            return EXIT_USER_ERROR
    if int(os.environ.get("RANK", "0")) == 0:
        write_json_atomic(result_path, {"result": result})
    return EXIT_OK


def main() -> None:
    """Entry point of the worker process."""
    die_with_parent()  # a rank of torchrun too, whose parent is not the supervisor
    request_path, result_path = (Path(argument) for argument in sys.argv[1:3])
    try:
        code = run(json.loads(request_path.read_text(encoding="utf-8")), result_path)
    except BaseException:
        write_json_atomic(result_path, {"traceback": traceback.format_exc()})
        raise
    sys.exit(code)


if __name__ == "__main__":
    main()
