"""Edges of the graph, read from the recipes' own keys: data by entry name, models by directory."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import dagster as dg

from mllm_assets.artifacts import slug
from mllm_assets.components.reporting import MAX_TAG_LENGTH
from mllm_assets.errors import RecipeError
from mllm_assets.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One recipe with the assets that it reads."""

    recipe: Recipe
    model: dg.AssetKey
    train_data: Mapping[str, dg.AssetKey]  # entry of dataset_info.json -> the asset that writes it
    eval_data: Mapping[str, dg.AssetKey]
    earlier_data: Sequence[dg.AssetKey] = ()  # what the stages before it train on; no edges, they come by its model

    @property
    def name(self) -> str:
        return self.recipe.name

    def key(self, asset: str) -> dg.AssetKey:
        return dg.AssetKey([self.name, asset])

    @property
    def tags(self) -> dict[str, str]:
        """Narrows the graph and the catalog to one line: `tag:recipe=emoji_sft`."""
        return {"recipe": self.name[:MAX_TAG_LENGTH], "finetuning_type": self.recipe.spec.finetuning_type}

    @property
    def data(self) -> list[dg.AssetKey]:
        """Assets of the training and the evaluation entries, each once."""
        return sorted({*self.train_data.values(), *self.eval_data.values()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What recipes can refer to.

    Attributes:
        entries: Entry of `dataset_info.json` -> the asset that writes it.
        models: `pretrains/<name>` -> its asset.
        recipes: `output_dir` of a recipe -> that recipe's checkpoint.
    """

    entries: Mapping[str, dg.AssetKey]
    models: Mapping[str, dg.AssetKey]
    recipes: Mapping[str, dg.AssetKey]


def resolve(recipe: Recipe, around: Surroundings) -> Node:
    """Find the assets that a recipe reads.

    Raises:
        RecipeError: An entry or a model that nothing makes. Names the nearest ones.
    """
    return Node(
        recipe=recipe,
        model=_model_key(recipe, around),
        train_data=_entry_keys(recipe, "dataset", recipe.spec.train_entries, around.entries),
        eval_data=_entry_keys(recipe, "eval_dataset", recipe.spec.eval_entries, around.entries),
    )


def split_circles(nodes: Sequence[Node]) -> tuple[list[Node], list[tuple[Node, RecipeError]]]:
    """Part the recipes that lead back to themselves from those that can be built; these get their `earlier_data`."""
    by_name = {node.name: node for node in nodes}
    sound: list[Node] = []
    circular: list[tuple[Node, RecipeError]] = []
    for node in nodes:
        walk = [node.name]
        while (start := by_name[walk[-1]].model.path[0]) in by_name and start not in walk:
            walk.append(start)
        if start != node.name:
            sound.append(node)
            continue
        circle = " <- ".join([*walk, node.name])
        text = (
            f"{node.recipe.path.name}: model_name_or_path leads back to the recipe itself ({circle}). "
            "Let one of them start from a model below pretrains/."
        )
        circular.append((node, RecipeError(text)))
    return _with_earlier_data(sound), circular


def _with_earlier_data(nodes: Sequence[Node]) -> list[Node]:
    """Tell each recipe what the recipes that it starts from are trained on."""
    by_name = {node.name: node for node in nodes}

    def earlier(node: Node) -> set[dg.AssetKey]:
        base = by_name.get(node.model.path[0])
        return {*base.train_data.values(), *earlier(base)} if base is not None else set()

    return [replace(node, earlier_data=sorted(earlier(node) - set(node.data))) for node in nodes]


def lines_of(nodes: Sequence[Node]) -> dict[str, list[str]]:
    """Recipes that start from one another, by the first of each line."""
    parent = {node.name: node.model.path[0] for node in nodes}
    lines: dict[str, list[str]] = {}
    for name in parent:
        first = name
        while parent[first] in parent:
            first = parent[first]
        lines.setdefault(first, []).append(name)
    return lines


def hand_written_entries(dataset_info: Path, made: Iterable[str]) -> dict[str, dg.AssetKey]:
    """Entries that a user wrote into `dataset_info.json`: each is an external asset, `<entry>/dataset_info`."""
    try:
        entries = json.loads(dataset_info.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # a broken file is reported, with its line, by whatever reads its rows
        return {}
    return {name: dg.AssetKey([slug(name), "dataset_info"]) for name in entries if name not in set(made)}


def _entry_keys(
    recipe: Recipe, key: str, names: Iterable[str], entries: Mapping[str, dg.AssetKey]
) -> dict[str, dg.AssetKey]:
    for name in names:
        if name not in entries:
            near = difflib.get_close_matches(name, entries, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise RecipeError(
                f"{recipe.path.name}: {key} names {name!r}, which no dataset writes. {hint}Known entries: "
                f"{', '.join(sorted(entries))}. Correct the recipe, or add the dataset below defs/datasets/."
            )
    return {name: entries[name] for name in names}


def _model_key(recipe: Recipe, around: Surroundings) -> dg.AssetKey:
    path = PurePosixPath(recipe.spec.model_name_or_path)
    if (known := around.models.get(str(path))) is not None:
        return known
    for output_dir, checkpoint in around.recipes.items():
        if path.is_relative_to(output_dir):
            if checkpoint.path[0] == recipe.name:
                raise RecipeError(
                    f"{recipe.path.name}: model_name_or_path {str(path)!r} is the recipe's own output. "
                    "Name the model that it starts from, for example pretrains/gemma3-4b-it."
                )
            return checkpoint
    raise RecipeError(
        f"{recipe.path.name}: model_name_or_path is {str(path)!r}, which no asset makes. Known models: "
        f"{', '.join(sorted(around.models))}; outputs of recipes: {', '.join(sorted(around.recipes))}. "
        "Correct the recipe, or declare the model in defs/pretrained/defs.yaml (kind: local for one of your own)."
    )
