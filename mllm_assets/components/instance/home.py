"""Opens Dagster's instance of `DAGSTER_HOME`, with an error that says why it does not open."""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import dagster as dg
import yaml
from filelock import FileLock

from mllm_assets.components.facts import facts_of
from mllm_assets.components.slots import IN_PROGRESS, find_dead_runs
from mllm_assets.errors import MachineError
from mllm_assets.project.create import make_home

UNSET = re.compile(r'environment variable "(\w+)" which is not set')


class InstanceError(MachineError):
    """The instance does not open. Says what is wrong with it, and what to do."""

    def __init__(self, error: Exception) -> None:
        home = os.environ.get("DAGSTER_HOME", "")
        self.problem, self.next_step = _diagnosis(Path(home), error)
        super().__init__(f"{self.problem} {self.next_step}")


def _diagnosis(home: Path, error: Exception) -> tuple[str, str]:
    """What is wrong and what to do, each a sentence."""
    if not home.is_absolute():
        return f"DAGSTER_HOME is {str(home)!r}, not an absolute path.", 'Correct it: export DAGSTER_HOME="$PWD/..."'
    if not home.is_dir():
        return f"DAGSTER_HOME is {home}, which is not a folder.", "Make it, or set the one that the deployment uses."
    if isinstance(error, dg.DagsterInvalidConfigError):
        if unset := dict.fromkeys(UNSET.findall(" ".join(wrong.message for wrong in error.errors))):
            step = "Set them here as for the services: their values are in the file that the services read."
            return f"{home}/dagster.yaml names variables that are not set: {', '.join(unset)}.", step
        first = error.errors[0].message.strip().splitlines()[0] if error.errors else "wrong settings"
        first = first.partition(" Expected: ")[0]  # what follows is pages of Dagster's settings
    elif isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        first = f"dagster.yaml:{error.problem_mark.line + 1}: {error.problem}"
    elif "more than one head" in str(error):
        step = "If it is new, remove everything in it but dagster.yaml, and begin again."
        return f"{home} does not open: two processes opened it for the first time, both at once.", step
    else:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    first = first.rstrip(".")
    return f"{home} does not open: {first}.", f"Correct {home}/dagster.yaml, or start the storage that it names."


def use_home(project: Path) -> str | None:
    """Let a project's own `.dagster_home` be DAGSTER_HOME where that is not set; return what to say about it.

    Raises:
        MachineError: The folder cannot be made.
    """
    if os.environ.get("DAGSTER_HOME"):
        return None
    try:
        home = make_home(project)
    except OSError as error:
        raise MachineError(
            f"{project} has no folder for Dagster's history, and none can be made there ({error.strerror}). Set "
            "DAGSTER_HOME to a folder that this user may write to."
        ) from None
    os.environ["DAGSTER_HOME"] = str(home)
    return f"history in {home.relative_to(project)}/ (DAGSTER_HOME is not set)"


@contextmanager
def open_instance() -> Iterator[dg.DagsterInstance]:
    """Open the instance, and query its storage once.

    Raises:
        InstanceError: The folder does not exist, its settings are wrong, or the storage does not answer.
    """
    with ExitStack() as stack:
        try:
            with _alone():
                instance = stack.enter_context(dg.DagsterInstance.get())
                instance.get_runs_count()
        except Exception as error:  # settings of dagster.yaml can raise anything: a database's driver, a bad value
            raise InstanceError(error) from None
        yield instance


def _alone() -> AbstractContextManager[object]:
    """Let commands open the instance one after another.

    Dagster makes its SQLite tables at the first opening. Of two commands at once on a new folder one fails there, or
    both write the version, after which no command opens the folder again.
    """
    home = Path(os.environ.get("DAGSTER_HOME", ""))
    if not home.is_absolute() or not os.access(home, os.W_OK):
        return nullcontext()
    return FileLock(home / "opening.lock", timeout=120)


def latest_metadata() -> tuple[str, str | None]:
    """The texts in the latest materialisations of the instance of DAGSTER_HOME, and a run that is in progress.

    Assets find what their inputs published in this metadata, wherever `latest` points. Without a DAGSTER_HOME no
    metadata outlives a command.
    """
    if not os.environ.get("DAGSTER_HOME"):
        return "", None
    with open_instance() as instance:
        texts = []
        for key in instance.all_asset_keys():
            event = instance.get_latest_materialization_event(key)
            if event is not None and event.asset_materialization is not None:
                values = facts_of(event.asset_materialization.metadata).values()
                texts += [value for value in values if isinstance(value, str)]
        dead = {run.run_id for run in find_dead_runs(instance)}
        running = instance.get_runs(dg.RunsFilter(statuses=IN_PROGRESS))
        alive = next((run for run in running if run.run_id not in dead), None)
    return "\n".join(texts), f"Dagster's run {alive.run_id[:8]} ({alive.job_name})" if alive else None
