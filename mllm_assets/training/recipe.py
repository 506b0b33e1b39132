"""A LLaMA-Factory recipe file, read once at the edge into a validated `TrainSpec`; every error names file and line."""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from mllm_assets.artifacts import slug
from mllm_assets.errors import RecipeError
from mllm_assets.redaction import holds_secret, redacted
from mllm_assets.training.checking import WrongTypeError, convert
from mllm_assets.training.idle_keys import idle_notes, repeated_notes
from mllm_assets.training.keys import ALIASES, KEYS
from mllm_assets.training.recipe_yaml import Entry, parse_value, read_yaml
from mllm_assets.training.spec import InvalidValueError, TrainSpec

_TYPES = typing.get_type_hints(TrainSpec)
# Relative paths stay inside the project's folder; an absolute one is the choice of who wrote the recipe
_PATHS = {"model_name_or_path", "dataset_dir", "output_dir", "deepspeed", "fsdp_config", "resume_from_checkpoint"}
_REQUIRED = {
    "model_name_or_path": "the directory of the model to start from, for example pretrains/gemma3-4b-it",
    "dataset": "the entry of dataset_info.json to train on, for example emoji_train",
    "template": "gemma3",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A recipe file with the overrides applied.

    Attributes:
        path: The file.
        name: Asset key part made from the file's stem.
        values: The keys as written (overrides included), before defaults.
        spec: What they mean.
        notes: One sentence for each key that was accepted and has no effect, and each entry that is named twice.
    """

    path: Path
    name: str
    values: Mapping[str, Any]
    spec: TrainSpec
    notes: tuple[str, ...]


def load_recipe(path: Path, overrides: Mapping[str, object] | Sequence[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: A LLaMA-Factory YAML file.
        overrides: Values that win over the file's: `{"max_steps": 10}`, or `["max_steps=10"]` from a command line.

    Raises:
        RecipeError: The file cannot be read, a key is unknown or refused, a value has the wrong type or cannot stand.
            Names file and line, or the override.
    """
    entries = read_yaml(path, str(path))
    entries.update(_override_entries(overrides))
    known: dict[str, Entry] = {}
    notes: list[str] = []
    for written, entry in entries.items():
        key, entry, note = _check(written, entry)
        notes.extend([note] if note else [])
        if key in _TYPES:
            if key in known:
                raise RecipeError(f"{entry.where}: {written} is another name of {key}, which is set too. Keep one.")
            known[key] = entry
    for key, example in _REQUIRED.items():
        if key not in known:
            raise RecipeError(f"{path}: {key} is missing. Add a line {key}: with {example}.")
    try:
        spec = TrainSpec(**{key: entry.value for key, entry in known.items()})
    except InvalidValueError as error:
        where = known[error.key].where if error.key in known else str(path)
        raise RecipeError(f"{where}: {error}") from None
    notes.extend(idle_notes(spec, {key for key in known if KEYS[key].asks_for_something(getattr(spec, key))}))
    notes.extend(repeated_notes(spec))
    values = {key: entry.value for key, entry in entries.items()}
    return Recipe(path=path, name=slug(path.stem), values=values, spec=spec, notes=tuple(notes))


def with_config_files(recipe: Recipe, root: Path) -> Recipe:
    """Put the content of the files that `fsdp_config` and `deepspeed` name in their place: it decides, not the path.

    Raises:
        RecipeError: A file is missing or holds no JSON object, or what it says cannot stand.
    """
    read: dict[str, Any] = {}
    for key in ("fsdp_config", "deepspeed"):
        name = getattr(recipe.spec, key)
        if not isinstance(name, str):
            continue
        path = root / name
        try:
            read[key] = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(
                f"{recipe.path}: {key} names {path}, which cannot be read ({error.strerror}). Correct the path, which "
                f"is relative to {root}."
            ) from None
        except ValueError as error:
            raise RecipeError(f"{recipe.path}: {key} names {path}, which is not JSON ({error}). Correct it.") from None
        if not isinstance(read[key], dict):
            raise RecipeError(f"{recipe.path}: {key} names {path}: expected a JSON object. Correct it.")
    try:
        return dataclasses.replace(recipe, spec=dataclasses.replace(recipe.spec, **read)) if read else recipe
    except InvalidValueError as error:
        raise RecipeError(f"{recipe.path}: {error}") from None


def _override_entries(overrides: Mapping[str, object] | Sequence[str] | None) -> dict[str, Entry]:
    if isinstance(overrides, Mapping):
        return {key: Entry(value, redacted(f"override {key}={value}")) for key, value in overrides.items()}
    entries = {}
    for argument in overrides or ():
        key, equals, text = argument.partition("=")
        where = redacted(f"argument {argument!r}")
        if not equals or not key:
            raise RecipeError(f"{where}: expected key=value, for example max_steps=10.")
        entries[key.strip()] = Entry(parse_value(text, where), where)
    return entries


def _check(written: str, entry: Entry) -> tuple[str, Entry, str | None]:
    """Look one key up: its present name, its converted value, and a note where it has no effect."""
    name, value = written, entry.value
    if written in ALIASES:
        name, value = ALIASES[written].name, ALIASES[written].convert(value)
    if name not in KEYS:
        near = get_close_matches(written, [*KEYS, *ALIASES], n=1, cutoff=0.5)
        advice = f"Did you mean {near[0]}?" if near else "Delete the line; keys are those of LLaMA-Factory's SFT."
        raise RecipeError(f"{entry.where}: unknown key {written!r}. {advice}")
    key = KEYS[name]
    try:
        value = convert(value, key.annotation)
    except WrongTypeError as error:
        raise RecipeError(f"{entry.where}: {written}: {error}. Change the value.") from None
    note = None
    if key.status != "supported" and key.asks_for_something(value):
        # The value is not shown: it may be a secret
        if key.status == "refused":
            raise RecipeError(f"{entry.where}: {written} is not supported with this value: {key.note}")
        note = f"{written} has no effect: {key.note}"
    if holds_secret(value):
        raise RecipeError(
            f"{entry.where}: the value of {written} holds what looks like a token or password. A recipe is copied into "
            "run folders, metadata and model cards: delete it here and set an environment variable, such as HF_TOKEN."
        )
    if name in _PATHS and isinstance(value, str) and ".." in PurePosixPath(value).parts:
        raise RecipeError(
            f"{entry.where}: {written} {value!r} may leave the project's folder. Write a relative path without .., "
            "which stays inside of it, or an absolute path where another folder is meant."
        )
    return name, Entry(value, entry.where), note
