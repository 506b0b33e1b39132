"""What `pyproject.toml` says of the project that a command runs in."""

import difflib
import re
import tomllib
from pathlib import Path

import yaml

from mllm_assets.artifacts import slug
from mllm_assets.errors import RecipeError
from mllm_assets.layout import Layout


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


def declared_models(project: Path) -> set[str]:
    """Names below `pretrains/` of the models that have an asset: those of the project, elsewhere of this package."""
    package = find_root_module(project)
    defs = (project / package.replace(".", "/") if package else Path(__file__).parents[1]) / "defs"
    names = set()
    for path in defs.rglob("defs.yaml"):
        try:
            documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, yaml.YAMLError):
            continue  # `check-graph` says what is wrong with it
        for document in documents:
            if isinstance(document, dict) and str(document.get("type")).endswith(".PretrainedModels"):
                models = (document.get("attributes") or {}).get("models") or []
                names |= {model["name"] for model in models if isinstance(model, dict) and "name" in model}
    return names


def materialize_command(asset: str) -> str:
    """The command that makes an asset and all it needs. Without `key:` the `+` would go up one layer only."""
    return f"dg launch{_definitions_option(Path.cwd())} --assets '+key:\"{asset}\"'"


def dev_command(project: Path) -> str:
    """The command that opens the UI: the Makefile's where the project has one."""
    makefile = project / "Makefile"
    if makefile.is_file() and re.search(r"^dev:", makefile.read_text(encoding="utf-8"), re.MULTILINE):
        return "make dev"
    return f"dg dev{_definitions_option(project)}"


def _definitions_option(project: Path) -> str:
    """In its folder dg finds a project by itself; elsewhere it is given this package's definitions."""
    return "" if find_root_module(project) else " -m mllm_assets.definitions"


def why_no_latest(layout: Layout, recipe: str) -> str:
    """What to say, and the command to run, where `outputs/<recipe>/latest` is missing.

    Raises:
        RecipeError: It is no recipe's name.
    """
    if find_root_module(Path.cwd()) is None and not layout.outputs.is_dir():  # what is run here would begin anew here
        return (
            f"{layout.root} holds no trained recipe, and {Path.cwd()} is no project. Run the command in the folder of "
            "your project, or set MLLM_ASSETS_ROOT to the folder that holds its data/ and outputs/."
        )
    require_known_recipe(layout, recipe)
    if finished := sorted(path.parent.name for path in (layout.outputs / recipe).glob("*/manifest.json")):
        return (
            f"The link {layout.relative(layout.outputs / recipe / 'latest')} is missing; finished runs: "
            f"{', '.join(finished)}. To have it again (nothing is trained twice): "
            f"{materialize_command(f'{recipe}/checkpoint')}"
        )
    return f"{recipe} was not trained below {layout.root}. Run: {materialize_command(f'{recipe}/released_model')}"


def require_known_recipe(layout: Layout, recipe: str) -> None:
    """Refuse a name that is no recipe's: a selection that matches nothing makes every asset of the project.

    Raises:
        RecipeError: Neither `configs/` nor `outputs/` knows it. Names the nearest.
    """
    outputs = [path.name for path in layout.outputs.glob("*") if (path / "latest").exists()]
    known = {*outputs, *(slug(path.stem) for path in layout.root.glob("configs/*.yaml"))}
    if known and recipe not in known:
        near = difflib.get_close_matches(recipe, known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise RecipeError(
            f"No recipe is called {recipe!r}. {hint}There are: {', '.join(sorted(known))}. A new one is a file in "
            "configs/."
        )
