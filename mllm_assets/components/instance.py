"""Dagster's instance of `DAGSTER_HOME`, opened so that whoever runs a command is told where it does not open."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import dagster as dg

from mllm_assets.errors import MachineError


class InstanceError(MachineError):
    """The instance does not open; says what is wrong with it, and what to do."""

    def __init__(self, error: Exception) -> None:
        home = os.environ.get("DAGSTER_HOME", "")
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self.problem = f"{home} does not open: {first}"
        self.next_step = f"Correct {home}/dagster.yaml, or start the storage that it names."
        super().__init__(f"{self.problem} {self.next_step}")


@contextmanager
def opened_instance() -> Iterator[dg.DagsterInstance]:
    """The instance, its storage reached once.

    Raises:
        InstanceError: The folder is not there, its settings are wrong, or the storage does not answer.
    """
    with ExitStack() as stack:
        try:
            instance = stack.enter_context(dg.DagsterInstance.get())
            instance.get_runs_count()
        except Exception as error:  # settings of dagster.yaml raise what they like: a database's driver, a bad value
            raise InstanceError(error) from None
        yield instance
