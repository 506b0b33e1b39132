"""The project that a command runs in, from its `pyproject.toml`."""

import os
import re
import shlex
import tomllib
from pathlib import Path

import yaml

from mllm_assets.artifacts import MANIFEST, UNNAMED, read_manifest, slug
from mllm_assets.errors import RecipeError, did_you_mean
from mllm_assets.layout import Layout
from mllm_assets.safe_yaml import load_all


def root_module(project: Path) -> str:
    """The package of a Dagster project, whose `defs/` declares datasets, models and recipes.

    Raises:
        RecipeError: The folder is not a project.
    """
    return _dg_project(project)["root_module"]


def definitions_module(project: Path) -> str:
    """The module that Dagster loads a project's definitions from.

    Raises:
        RecipeError: The folder is not a project.
    """
    values = _dg_project(project)
    return values.get("code_location_target_module") or f"{values['root_module']}.definitions"


def _dg_project(project: Path) -> dict[str, str]:
    path = project / "pyproject.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))["tool"]["dg"]["project"]
        if not isinstance(values["root_module"], str):
            raise KeyError("root_module")
        return values
    except (OSError, KeyError, TypeError, UnicodeError, tomllib.TOMLDecodeError):
        raise RecipeError(
            f"{path} names no Dagster project (`root_module` in [tool.dg.project]). Run the command in the folder of "
            "the project that it is for; `mllm-assets init DIR` makes one."
        ) from None


def find_root_module(project: Path) -> str | None:
    """`root_module`, or None if the folder is not a project."""
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
            documents = load_all(path)
        except (OSError, ValueError, yaml.YAMLError):
            continue  # `check-graph` says what is wrong with it
        for document in documents:
            if isinstance(document, dict) and str(document.get("type")).endswith(".PretrainedModels"):
                attributes = document.get("attributes")
                models = attributes.get("models") if isinstance(attributes, dict) else None
                models = models if isinstance(models, list) else []
                found = [model.get("name") for model in models if isinstance(model, dict)]
                names |= {name for name in found if isinstance(name, str)}
    return names


def materialize_command(target: str) -> str:
    """The command that makes a recipe, a dataset or an asset, and what it needs; a named asset is always made."""
    return f"mllm-assets run {shlex.quote(target)}"


def dev_command(project: Path) -> str:
    """The command that opens the UI: the Makefile's if the project has one."""
    makefile = project / "Makefile"
    if makefile.is_file() and re.search(r"^dev:", makefile.read_text(encoding="utf-8"), re.MULTILINE):
        return "make dev"
    # in its folder dg finds a project by itself; elsewhere it is given this package's definitions
    return "dg dev" if find_root_module(project) else "dg dev -m mllm_assets.definitions"


def plain_name(layout: Layout, name: str) -> str:
    """The name of a recipe or of a run, `<recipe>/<fingerprint>`, where its file or its folder is given."""
    if name.endswith((".yaml", ".yml")):
        return slug(Path(name).stem, UNNAMED)
    outputs = Path(os.path.abspath(layout.outputs))
    for folder in (Path.cwd(), layout.root):
        found = Path(os.path.abspath(folder / name))  # links are not followed, so that `latest` keeps its recipe
        if found.is_relative_to(outputs) and found != outputs:
            return "/".join(found.relative_to(outputs).parts[:2])
    return name


def recipe_file(layout: Layout, recipe: str) -> Path | None:
    """The file in `configs/` of a recipe's name."""
    return next((path for path in sorted(layout.configs.glob("*.yaml")) if slug(path.stem, UNNAMED) == recipe), None)


def why_no_latest(layout: Layout, recipe: str) -> str:
    """What to say, and the command to run, where `outputs/<recipe>/latest` is missing.

    Raises:
        RecipeError: It is not a recipe's name.
    """
    if find_root_module(Path.cwd()) is None and not layout.outputs.is_dir():  # a command would start a new root here
        return (
            f"{layout.root} holds no trained recipe, and {Path.cwd()} is not a project. Run the command in the folder "
            "of your project, or set MLLM_ASSETS_ROOT to the folder that holds its data/ and outputs/."
        )
    require_known_recipe(layout, recipe)
    runs = {path.parent.name: read_manifest(path.parent) for path in (layout.outputs / recipe).glob(f"*/{MANIFEST}")}
    trials = {name: run["overrides"] for name, run in sorted(runs.items()) if run.get("overrides")}
    command = materialize_command(f"{recipe}/checkpoint")
    if trials and len(trials) == len(runs):
        shown = "; ".join(f"{name} ({' '.join(f'{k}={v}' for k, v in said.items())})" for name, said in trials.items())
        return (
            f"{recipe} was not trained as its file says; runs with other values: {shown}. To see one: mllm-assets "
            f"summary {recipe}/<run>. To train it as written: {command}"
        )
    if runs:
        return (
            f"The link {layout.relative(layout.outputs / recipe / 'latest')} is missing; finished runs: "
            f"{', '.join(sorted(runs))}. To have it again (nothing is trained twice): {command}"
        )
    return f"{recipe} was not trained below {layout.root}. Run: {materialize_command(recipe)}"


def require_known_recipe(layout: Layout, recipe: str) -> None:
    """Refuse a name that is not a recipe's: a selection that matches nothing makes every asset of the project.

    Raises:
        RecipeError: Neither `configs/` nor `outputs/` knows it. Names the nearest.
    """
    outputs = [path.name for path in layout.outputs.glob("*") if (path / "latest").exists()]
    known = {*outputs, *(slug(path.stem, UNNAMED) for path in layout.configs.glob("*.yaml"))}
    if known and recipe not in known:
        raise RecipeError(
            f"No recipe is called {recipe!r}. {did_you_mean(recipe, known)}There are: {', '.join(sorted(known))}. "
            "A new one is a file in configs/."
        )
