"""The default executor: a process for each step, forked from one that has built the definitions.

Dagster's starts a new Python for each step, which builds all definitions: 24 CPU-seconds with 500 datasets
and 500 recipes. With a fork server a run builds them twice, whatever it makes: in its own process, and in the server.
"""

import os
import sys
from typing import Any

import dagster as dg
from dagster._core.definitions.reconstruct import ReconstructableJob

POINTER = "MLLM_ASSETS_STEP_DEFINITIONS"  # to a run's definitions, for the server that its process starts
RUN_PID = "MLLM_ASSETS_RUN_PID"
_SERVER = "mllm_assets.components.instance.step_server"
_DAGSTERS: Any = dg.multi_or_in_process_executor


@dg.executor(name=_DAGSTERS.name, config_schema=_DAGSTERS.config_schema, requirements=_DAGSTERS.get_requirements)
def forking_executor(init: dg.InitExecutorContext) -> dg.Executor:
    """Dagster's `multi_or_in_process_executor`; where no `start_method` is configured, steps are forks.

    Not on macOS, whose own libraries may not be used in a fork.
    """
    settings = init.executor_config.get("multiprocess")
    if sys.platform == "linux" and isinstance(settings, dict) and "start_method" not in settings:
        if isinstance(init.job, ReconstructableJob):
            os.environ[RUN_PID] = str(os.getpid())
            pointer: Any = init.job.repository.pointer
            os.environ[POINTER] = dg.serialize_value(pointer)
            forks = {**settings, "start_method": {"forkserver": {"preload_modules": [_SERVER]}}}
            return _DAGSTERS.executor_creation_fn(init._replace(executor_config={"multiprocess": forks}))
    return _DAGSTERS.executor_creation_fn(init)


def run_pid() -> int:
    """In a step's process, that of its run: its parent, or the one that started the server that it is a fork of."""
    return int(os.environ.get(RUN_PID, os.getppid()))
