"""A project's definitions, built once in a process.

To run one command Dagster asks for them five times, and twice in the process of each step. Each takes 0.2 s of CPU time
for a project with one dataset, most of it for the JSON schemas of all components, which only the UI shows.
"""

from pathlib import Path

import dagster as dg
from dagster._core.definitions.definitions_load_context import DefinitionsLoadContext

from mllm_assets.components.instance.step_forks import forking_executor

_kept: dict[Path, dg.Definitions] = {}


def load_once(package: Path) -> dg.Definitions:
    """The definitions of the project whose package is in a folder, as its files were when this process first asked.

    Not kept where a component has a state that Dagster keeps (`StateBackedComponent`): each load has to ask for it.
    """
    if package in _kept:
        return _kept[package]
    with DefinitionsLoadContext.scoped(context := DefinitionsLoadContext.get()):
        definitions = dg.load_from_defs_folder(path_within_project=package)
        if definitions.executor is None:
            definitions = dg.Definitions.merge(definitions, dg.Definitions(executor=forking_executor))
    state = context.accessed_defs_state_info
    if not (state and state.info_mapping) and not context.get_pending_reconstruction_metadata():
        _kept[package] = definitions
    return definitions


def forget() -> None:
    """Let the next load read the files again."""
    _kept.clear()
