"""Finds the directory of a model by its name, and the turn format that it was trained in."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import is_complete, read_manifest
from mllm_assets.errors import ModelError, nearest
from mllm_assets.layout import Layout
from mllm_assets.project.read import plain_name, why_no_latest
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.releases.versions import current_release, is_release, list_releases, require_intact, version_folders
from mllm_assets.training.runs.models import HOW_TO_NAME, NamedModel, find_model
from mllm_assets.training.runs.run_file import read_run_file


def find_named_model(name: str | Path, layout: Layout) -> NamedModel:
    """Find a model by path, release, recipe or pretrained name; a path that exists wins.

    Raises:
        ModelError: Not found. Says what was searched for and what exists.
        IntegrityError: It is a release, and one of its files changed since.
    """
    text = str(name)
    directory = _find(text, layout)
    if is_release(directory):
        require_intact(directory)
    recipe = _recipe_of(directory)
    return NamedModel(name=text, directory=directory, turns=TurnSettings.of(recipe), media_dir=recipe.get("media_dir"))


def _find(text: str, layout: Layout) -> Path:
    if text.endswith((".yaml", ".yml")):
        text = plain_name(layout, text)
    for path in (Path(text), layout.root / text):
        if path.exists():
            return find_model(path)
    if text.startswith("pretrained/"):
        return _one_of(text.removeprefix("pretrained/"), text, layout.pretrains)
    recipe, at, version = text.partition("@")
    if re.fullmatch(r"[a-z0-9_]+", recipe) is None:  # not a recipe's name, so a path
        return find_model(Path(text))
    if at:
        return _version(recipe, version, layout)
    if release := current_release(layout, recipe):
        return release.directory
    latest = layout.outputs / recipe / "latest"
    if not latest.exists():
        if (layout.outputs / recipe).is_dir():
            raise ModelError(why_no_latest(layout, recipe))
        known = {path.name for parent in ("outputs", "releases") for path in layout.root.glob(f"{parent}/*/")}
        hint = "".join(f"Did you mean {near}? " for near in nearest(text, known))
        raise ModelError(
            f"{text} is neither a directory nor a recipe with a finished run below {layout.root}. "
            f"{hint}Give {HOW_TO_NAME}."
        )
    return find_model(latest)


def _version(recipe: str, version: str, layout: Layout) -> Path:
    """The directory of `<recipe>@v2`, or of `<recipe>@checkpoint-40`: one of its latest run."""
    if version.startswith("checkpoint-"):
        latest = layout.outputs / recipe / "latest"
        if not latest.is_dir():
            raise ModelError(why_no_latest(layout, recipe))
        return _one_of(version, f"{recipe}@{version}", latest, pattern="checkpoint-*")
    for path in version_folders(layout, recipe):
        if path.name == version:
            return path  # the caller checks its files like those of any release
    releases = list_releases(layout, recipe)
    there = ", ".join(f"{recipe}@{release.version}" for release in releases)
    raise ModelError(
        f"{recipe} has no release {version!r} in {layout.releases(recipe)}. "
        f"{f'There is {there}.' if there else 'Nothing of it is released yet.'}"
    )


def _one_of(name: str, text: str, parent: Path, pattern: str = "*") -> Path:
    found = sorted(path.name for path in parent.glob(pattern) if path.is_dir())
    if name in found:
        return find_model(parent / name)
    there = f"There is {', '.join(found)}." if found else "That folder holds none."
    raise ModelError(f"{text} is not there: {parent} has no folder {name!r}. {there}")


def _recipe_of(directory: Path) -> Mapping[str, Any]:
    """The recipe's keys, from the manifest of the release, or of the run that the directory is or belongs to."""
    for place in (directory, directory.parent):
        if is_complete(place):
            manifest = read_manifest(place)
            recipe = manifest.get("lineage", {}).get("recipe", manifest.get("recipe"))
            if isinstance(recipe, dict):
                return recipe
    return read_run_file(directory.parent).get("starts_from", {}).get("recipe", {})  # of a run that is not finished
