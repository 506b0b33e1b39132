"""Code from outside the package that registers model families, metrics, gates, sources or quality probes.

Every process of a run must know what is registered: the graph, the commands, the worker and the image decoder. Each
calls `load_plugins` when it starts.
"""

import importlib
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mllm_assets.errors import MllmAssetsError, RecipeError
from mllm_assets.settings import PLUGINS

T = TypeVar("T")
MODULES: dict[str, Any] = sys.modules  # None means that a module counts as not installed


def load_plugins() -> None:
    """Import the modules that `MLLM_ASSETS_PLUGINS` names (separated by commas), else the project's pyproject.toml.

    There it is `plugins = ["my_project.plugins"]` below `[tool.mllm_assets]`. The processes that this one starts find
    them in the variable.

    Raises:
        RecipeError: A module cannot be imported. Names it and says why.
    """
    named = os.environ.get(PLUGINS)
    names = [name.strip() for name in named.split(",") if name.strip()] if named else _of_project(Path.cwd())
    if not names:
        return
    os.environ[PLUGINS] = ",".join(names)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # where `python -m` looks too, unlike an installed command
    for name in names:
        try:
            importlib.import_module(name)
        except MllmAssetsError:
            raise
        except Exception as error:
            raise RecipeError(
                f"The plugin {name!r} cannot be imported ({type(error).__name__}: {error}). Correct {PLUGINS} or "
                "[tool.mllm_assets] plugins in pyproject.toml, or install the package that holds it."
            ) from error


def _of_project(folder: Path) -> list[str]:
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    plugins = project.get("tool", {}).get("mllm_assets", {}).get("plugins", [])
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise RecipeError(
            f"{folder / 'pyproject.toml'}: [tool.mllm_assets] plugins is {plugins!r}: expected a list of module names."
        )
    return plugins


def add(registry: dict[str, T], name: str, entry: T, what: str) -> None:
    """Put an entry into a registry; the same one may be added again.

    Raises:
        RecipeError: Another has the name.
    """
    if registry.setdefault(name, entry) != entry:
        raise RecipeError(f"The {what} {name!r} already exists. Register yours under another name.")


def resolve(reference: str) -> Any:
    """Import what a `module:name` refers to: code that must not load with the graph is named, not imported."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


@contextmanager
def counting_as_missing(names: Sequence[str]) -> Iterator[None]:
    """Let modules that are not loaded count as not installed, for libraries that import them without a need."""
    hidden = [name for name in names if MODULES.setdefault(name, None) is None]
    try:
        yield
    finally:
        for name in hidden:
            del MODULES[name]
