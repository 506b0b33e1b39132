"""What `pyproject.toml` says of the project that a command runs in."""

import tomllib
from pathlib import Path

from mllm_assets.errors import RecipeError


def root_module(project: Path) -> str:
    """The package of a Dagster project, whose `defs/` declares datasets, models and recipes.

    Raises:
        RecipeError: There is no project in the folder.
    """
    path = project / "pyproject.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))["tool"]["dg"]["project"]["root_module"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        raise RecipeError(
            f"{path} names no Dagster project (`root_module` in [tool.dg.project]). Run the command in the folder of "
            "the project that it is for; `mllm-assets init DIR` makes one."
        ) from None


def find_root_module(project: Path) -> str | None:
    """Likewise, or None where there is no project."""
    try:
        return root_module(project)
    except RecipeError:
        return None


def definitions_module(project: Path) -> str:
    """The module that `dagster -m` is given: the project's own where there is one, otherwise this package's."""
    return f"{find_root_module(project) or 'mllm_assets'}.definitions"


def materialize_command(asset: str) -> str:
    """The command that makes an asset and all it needs. Without `key:` the `+` would go up one layer only."""
    return f"dagster asset materialize -m {definitions_module(Path.cwd())} --select '+key:\"{asset}\"'"
