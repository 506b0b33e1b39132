"""The project's definitions as Dagster loads them, and the names that a person gives to what they make."""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import dagster as dg
from dagster._cli.workspace.cli_target import get_repository_python_origin_from_cli_opts
from dagster._core.definitions.reconstruct import ReconstructableJob
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._utils.hosted_user_process import recon_job_from_origin, recon_repository_from_origin
from dagster_shared.cli import PythonPointerOpts

from mllm_assets.artifacts import slug
from mllm_assets.components.assets.checkpoint import RECIPE_FILE
from mllm_assets.components.facts import facts_of
from mllm_assets.components.loading import forget
from mllm_assets.components.reporting import OFF, innermost
from mllm_assets.errors import MllmAssetsError, RecipeError, did_you_mean
from mllm_assets.project.read import definitions_module, find_root_module
from mllm_assets.recipe.keys import KEYS

NOT_IMPLIED = "hub_model"  # it publishes: only a run that names it makes it
MODELS = "pretrained"


def module_of(folder: Path) -> str:
    """The module of the definitions that a command in a folder runs.

    Raises:
        RecipeError: The folder is not a project.
    """
    if find_root_module(folder) is None and "MLLM_ASSETS_ROOT" in os.environ:
        return "mllm_assets.definitions"
    return definitions_module(folder)


class Location:
    """The definitions of the project in a folder; of this package, where only MLLM_ASSETS_ROOT says what they are for.

    Raises:
        RecipeError: The folder is not a project.
        MllmAssetsError: The definitions do not load.
    """

    def __init__(self, folder: Path) -> None:
        module = module_of(folder)
        forget()
        options = PythonPointerOpts(module_name=module, working_directory=str(folder))
        try:
            self._origin: RepositoryPythonOrigin = get_repository_python_origin_from_cli_opts(options)
            self.repository: dg.RepositoryDefinition = recon_repository_from_origin(self._origin).get_definition()
        except Exception as error:  # the project's own files can raise anything
            cause = innermost(error)
            if isinstance(cause, MllmAssetsError):
                raise cause from None
            first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise RecipeError(
                f"{module} does not load: {first} `mllm-assets check-graph` names file and line."
            ) from None

    def job(self, name: str) -> ReconstructableJob:
        return recon_job_from_origin(JobPythonOrigin(name, repository_origin=self._origin))

    @cached_property
    def keys(self) -> dict[str, dg.AssetKey]:
        """What a run can make, by name."""
        return {key.to_user_string(): key for key in self.repository.asset_graph.materializable_asset_keys}

    @cached_property
    def owners(self) -> dict[str, list[dg.AssetKey]]:
        """Recipes and datasets with their assets, each after what it is made from."""
        found: dict[str, list[dg.AssetKey]] = {}
        for key in self.repository.asset_graph.toposorted_asset_keys:
            if key.to_user_string() in self.keys and len(key.path) > 1 and key.path[0] != MODELS:
                found.setdefault(key.path[0], []).append(key)
        return found

    def plain(self, name: str) -> str:
        """A recipe's name where its file is given; a shell that completes a name adds a slash.

        Raises:
            RecipeError: Another file is meant than the recipe's own.
        """
        if not name.endswith((".yaml", ".yml")):
            return name.rstrip("/") or name
        given, owner = Path(name), slug(Path(name).stem)
        node = self.keys.get(f"{owner}/checkpoint")
        file = facts_of(self.repository.asset_graph.get(node).metadata).get(RECIPE_FILE) if node else None
        if file and given.exists() and given.resolve() != Path(file).resolve():
            raise RecipeError(
                f"{name} is not the recipe {owner}, which is {file}. Run that one, or this without Dagster: "
                f"mllm-assets train {name}. Nothing was run."
            )
        return owner

    def find(self, name: str) -> list[dg.AssetKey]:
        """The assets that a name asks for.

        It is that of a recipe (also its file), a dataset or a model: the last asset of its line; or of an asset, or a
        pattern such as `*/sample_quality`, which leaves out what is switched off and what publishes.

        Raises:
            RecipeError: There is none. Names the nearest.
        """
        typed, name = name, self.plain(name)
        if name in self.keys:
            return [self.keys[name]]
        if name in self.owners:
            return self._ends(self.owners[name])
        if (model := f"{MODELS}/{_slug(name)}") in self.keys:
            return [self.keys[model]]
        if matching := self._matching(name):
            on = [key for key in matching if OFF not in self.repository.asset_graph.get(key).tags]
            return sorted(on or matching)
        name = name.lstrip("+").removeprefix("key:").strip("\"'/")  # what `dg launch --assets` takes
        owner, _, asset = name.partition("/")
        known = [*self.owners, *self.keys, *(shown.rpartition("/")[2] for shown in self.keys if _is_model(shown))]
        nearest = f"A recipe's key takes a value: {name}=VALUE. " if name in KEYS else did_you_mean(name, known)
        if owner in self.owners and asset:
            there = f"{owner} has {', '.join(key.path[-1] for key in self.owners[owner])}."
        else:
            there = f"There are: {', '.join(sorted(self.owners))}; models: {', '.join(self._models())}."
        raise RecipeError(f"Nothing is called {typed!r}. {nearest}{there} Nothing was run.")

    def _matching(self, pattern: str) -> list[dg.AssetKey]:
        found = [key for shown, key in self.keys.items() if "*" in pattern and fnmatchcase(shown, pattern)]
        return [key for key in found if key.path[-1] != NOT_IMPLIED]

    def _ends(self, keys: Iterable[dg.AssetKey]) -> list[dg.AssetKey]:
        mine = {key for key in keys if key.path[-1] != NOT_IMPLIED}
        graph = self.repository.asset_graph
        return sorted(key for key in mine if not graph.get(key).child_keys & mine)

    def _models(self) -> list[str]:
        return sorted(shown.partition("/")[2] for shown in self.keys if _is_model(shown)) or ["none"]


def _is_model(shown: str) -> bool:
    return shown.startswith(f"{MODELS}/")


def _slug(name: str) -> str:
    try:
        return slug(name)
    except RecipeError:
        return ""
