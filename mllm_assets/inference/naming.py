"""From what a person calls a model to its directory, and the turn format that it was trained in."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import is_complete, read_manifest
from mllm_assets.errors import ModelError
from mllm_assets.evaluation.release_integrity import is_release, require_intact
from mllm_assets.evaluation.release_versions import current_release, list_releases, version_folders
from mllm_assets.inference import HOW_TO_NAME
from mllm_assets.layout import Layout
from mllm_assets.project.read import why_no_latest
from mllm_assets.training.run_file import read_run_file
from mllm_assets.training.spec import IMAGE_MAX_PIXELS, IMAGE_MIN_PIXELS


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model that can be asked.

    Attributes:
        name: As the person called it.
        directory: A Hugging Face model directory, or a `checkpoint-<step>` of a run.
        template: Turn format that it was trained in; None where nothing says so: its family's usual one.
        enable_thinking: As in its training.
        image_max_pixels: Larger images are first shrunk to this area, as in its training.
        image_min_pixels: Smaller images are first enlarged to this area.
    """

    name: str
    directory: Path
    template: str | None = None
    enable_thinking: bool | None = True
    image_max_pixels: int = IMAGE_MAX_PIXELS
    image_min_pixels: int = IMAGE_MIN_PIXELS


def find_named_model(name: str | Path, layout: Layout) -> NamedModel:
    """Find a model by path, release, recipe or pretrained name; a path that exists wins.

    Raises:
        ModelError: There is none. Says what was looked for and what there is.
        IntegrityError: It is a release, and a file of it is not as it was released.
    """
    text = str(name)
    directory = _find(text, layout)
    if is_release(directory):
        require_intact(directory)
    recipe = _recipe_of(directory)
    return NamedModel(
        name=text,
        directory=directory,
        template=recipe.get("template"),
        enable_thinking=recipe.get("enable_thinking", True),
        image_max_pixels=recipe.get("image_max_pixels", NamedModel.image_max_pixels),
        image_min_pixels=recipe.get("image_min_pixels", NamedModel.image_min_pixels),
    )


def find_model(directory: Path) -> Path:
    """The model directory or checkpoint that a path stands for: itself, or `model/` of a training run.

    Raises:
        ModelError: There is none. Says what the path is and what to give in its place.
    """
    if (directory / "config.json").is_file() or is_checkpoint(directory):
        return directory
    if (directory / "model" / "config.json").is_file():
        return directory / "model"
    if not directory.exists():
        raise ModelError(
            f"{directory} does not exist. Give a model directory, for example outputs/<recipe>/latest/model."
        )
    if not directory.is_dir():
        raise ModelError(f"{directory} is a file, no model directory. Give {HOW_TO_NAME}.")
    raise ModelError(
        f"{directory} is no model directory: it has neither config.json nor model/config.json. "
        "Give a Hugging Face model directory, a release or a finished training run."
    )


def is_checkpoint(directory: Path) -> bool:
    """Say whether a directory holds what a run has trained up to a step, and no whole model."""
    is_named_so = re.fullmatch(r"checkpoint-\d+", directory.name) is not None
    return is_named_so and directory.is_dir() and not (directory / "config.json").is_file()


def _find(text: str, layout: Layout) -> Path:
    for path in (Path(text), layout.root / text):
        if path.exists():
            return find_model(path)
    if text.startswith("pretrained/"):
        return _one_of(text.removeprefix("pretrained/"), text, layout.pretrains)
    recipe, at, version = text.partition("@")
    if re.fullmatch(r"[a-z0-9_]+", recipe) is None:  # no recipe's name, so a path
        return find_model(Path(text))
    if at:
        return _version(recipe, version, layout)
    if release := current_release(layout, recipe):
        return release.directory
    latest = layout.outputs / recipe / "latest"
    if not latest.exists():
        known = {path.name for parent in ("outputs", "releases") for path in _folders(layout.root / parent)}
        raise ModelError(
            f"{text} is neither a directory nor a recipe with a finished run below {layout.root}. "
            f"{_nearest(text, known)}Give {HOW_TO_NAME}."
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
            return path  # its files are looked at like those of any release
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


def _folders(parent: Path) -> Iterable[Path]:
    return (path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else ()


def _nearest(text: str, known: set[str]) -> str:
    near = get_close_matches(text, sorted(known), n=1)
    return f"Did you mean {near[0]}? " if near else ""


def _recipe_of(directory: Path) -> Mapping[str, Any]:
    """The recipe's keys, as far as the release tells them, or the run that the directory is, or is part of."""
    for place in (directory, directory.parent):
        if is_complete(place):
            manifest = read_manifest(place)
            recipe = manifest.get("lineage", {}).get("recipe", manifest.get("recipe"))
            if isinstance(recipe, dict):
                return recipe
    return read_run_file(directory.parent).get("starts_from", {}).get("recipe", {})  # of a run that is not finished
