"""Dagster's instance of `DAGSTER_HOME`, opened so that whoever runs a command is told where it does not open."""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import dagster as dg
import yaml

from mllm_assets.errors import MachineError

UNSET = re.compile(r'environment variable "(\w+)" which is not set')


class InstanceError(MachineError):
    """The instance does not open; says what is wrong with it, and what to do."""

    def __init__(self, error: Exception) -> None:
        home = os.environ.get("DAGSTER_HOME", "")
        self.problem, self.next_step = _diagnosis(Path(home), error)
        super().__init__(f"{self.problem} {self.next_step}")


def _diagnosis(home: Path, error: Exception) -> tuple[str, str]:
    """What is wrong and what to do, each a sentence."""
    if not home.is_absolute():
        return f"DAGSTER_HOME is {str(home)!r}, no absolute path.", 'Set it anew: export DAGSTER_HOME="$PWD/..."'
    if not home.is_dir():
        return f"DAGSTER_HOME is {home}, which is no folder.", "Make it, or set the one that the deployment uses."
    if isinstance(error, dg.DagsterInvalidConfigError):
        if unset := dict.fromkeys(UNSET.findall(" ".join(wrong.message for wrong in error.errors))):
            step = "Set them here as for the services: their values are in the file that the services read."
            return f"{home}/dagster.yaml names variables that are not set: {', '.join(unset)}.", step
        first = error.errors[0].message.strip().splitlines()[0] if error.errors else "wrong settings"
        first = first.partition(" Expected: ")[0]  # all of Dagster's settings, some pages
    elif isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        first = f"dagster.yaml:{error.problem_mark.line + 1}: {error.problem}"
    else:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    first = first.rstrip(".")
    return f"{home} does not open: {first}.", f"Correct {home}/dagster.yaml, or start the storage that it names."


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
