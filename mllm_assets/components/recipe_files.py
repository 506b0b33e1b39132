"""The recipe files of a project; one that cannot be read becomes an asset that fails with the message."""

from pathlib import Path, PurePosixPath

import dagster as dg

from mllm_assets.artifacts import slug
from mllm_assets.components.reporting import failing_asset
from mllm_assets.errors import MllmAssetsError, RecipeError
from mllm_assets.training.recipe import Recipe, load_recipe


def read_recipes(project_root: Path, pattern: str) -> tuple[list[Recipe], list[dg.AssetsDefinition]]:
    """Read the recipe files; each one that cannot be read becomes an asset that fails with the message."""
    by_name: dict[str, list[Path]] = {}
    for path in sorted(project_root.glob(pattern)):
        by_name.setdefault(slug(path.stem), []).append(path)
    recipes: list[Recipe] = []
    errors: dict[str, MllmAssetsError] = {}
    for name, paths in by_name.items():
        try:
            recipes.append(_read_recipe(paths))
        except MllmAssetsError as error:
            errors[name] = error
    errors |= _shared_output_dirs(recipes)
    unreadable = [failing_asset(dg.AssetKey([name, "checkpoint"]), "train", error) for name, error in errors.items()]
    return [recipe for recipe in recipes if recipe.name not in errors], unreadable


def _read_recipe(paths: list[Path]) -> Recipe:
    if len(paths) > 1:
        raise RecipeError(
            f"{' and '.join(path.name for path in paths)} would both be the recipe {slug(paths[0].stem)!r}. Rename one."
        )
    return load_recipe(paths[0])


def _shared_output_dirs(recipes: list[Recipe]) -> dict[str, MllmAssetsError]:
    """Name -> error of each recipe whose `output_dir` is another's too; the one that it is named after keeps it."""
    sharing: dict[PurePosixPath, list[Recipe]] = {}
    for recipe in recipes:
        sharing.setdefault(PurePosixPath(recipe.spec.output_dir), []).append(recipe)
    return {
        recipe.name: RecipeError(
            f"{recipe.path.name}: output_dir {recipe.spec.output_dir!r} is also that of "
            f"{' and '.join(other.path.name for other in group if other is not recipe)}. "
            f"Give it one of its own, for example outputs/{recipe.name}."
        )
        for output_dir, group in sharing.items()
        if len(group) > 1
        for recipe in group
        if recipe.name != slug(output_dir.name)
    }
