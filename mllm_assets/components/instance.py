"""Dagster's instance of `DAGSTER_HOME`, opened so that whoever runs a command is told where it does not open."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import dagster as dg

from mllm_assets.errors import MachineError


@contextmanager
def opened_instance() -> Iterator[dg.DagsterInstance]:
    """The instance, its storage reached once.

    Raises:
        MachineError: The folder is not there, its settings are wrong, or the storage does not answer.
    """
    with ExitStack() as stack:
        try:
            instance = stack.enter_context(dg.DagsterInstance.get())
            instance.get_runs_count()
        except Exception as error:  # settings of dagster.yaml raise what they like: a database's driver, a bad value
            raise MachineError(" ".join(why_not_open(error))) from None
        yield instance


def why_not_open(error: Exception) -> tuple[str, str]:
    """What is wrong with the instance, and what to do."""
    home = os.environ.get("DAGSTER_HOME", "")
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{home} does not open: {first}", f"Correct {home}/dagster.yaml, or start the storage that it names."
