"""A LLaMA-Factory recipe file, read once at the edge into a validated `TrainSpec`; every error names file and line."""

import dataclasses
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mllm_assets.artifacts import MAX_NAME_BYTES, MAX_PATH_BYTES, slug
from mllm_assets.errors import RecipeError, all_of
from mllm_assets.families.family import TEMPLATES
from mllm_assets.recipe.keys import ALIASES, KEYS, ineffective_notes, repeated_notes, value_advice
from mllm_assets.recipe.other_names import advice_for
from mllm_assets.recipe.spec import InvalidValueError, TrainSpec
from mllm_assets.recipe.yaml_file import Entry, WrongTypeError, convert, parse_value, read_yaml
from mllm_assets.redaction import holds_secret, redacted

_TYPES = typing.get_type_hints(TrainSpec)
# Relative paths stay inside the project's folder; an absolute one is the recipe author's choice
_PATHS = {"model_name_or_path", "dataset_dir", "output_dir", "deepspeed", "fsdp_config", "resume_from_checkpoint"}
_PATHS |= {"adapter_name_or_path", "media_dir", "new_special_tokens_config"}
_REQUIRED = {
    "model_name_or_path": "the directory of the model to start from, for example pretrains/gemma3-4b-it",
    "dataset": "the entry of dataset_info.json to train on, for example emoji_train",
    "template": "gemma3",
}
# for the checks of the other values of a recipe that lacks them
_STAND_INS = {"model_name_or_path": "model", "dataset": "dataset", "template": next(iter(TEMPLATES))}
MAX_SHOWN = 200  # characters
_NAMES = [*KEYS, *ALIASES]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A recipe file with the overrides applied."""

    path: Path
    name: str  # the part of an asset key that is made from the file's stem
    values: Mapping[str, Any]  # the keys as written (overrides included), before defaults
    spec: TrainSpec
    notes: tuple[str, ...]  # a sentence for each key that has no effect, and each entry that is named twice


def load_recipe(path: Path, overrides: Mapping[str, object] | Sequence[str] | None = None) -> Recipe:
    """Read a recipe. `overrides` win over the file: `{"max_steps": 10}`, or `["max_steps=10"]` from a command line.

    Raises:
        RecipeError: The file cannot be read, a key is unknown or refused, a value has the wrong type or is invalid.
            Names file and line, or the override, of each.
    """
    problems = _Problems(str(path))
    entries = read_yaml(path, str(path), problems.texts)
    entries.update(_override_entries(overrides))
    known: dict[str, Entry] = {}
    notes: list[str] = []
    for written, entry in entries.items():
        try:
            key, entry, note = _check(written, entry)
            if key in known:
                raise RecipeError(f"{entry.where}: {written} is another name of {key}, which is set too. Keep one.")
        except RecipeError as error:
            problems.add(str(error), written)
            continue
        notes.extend([note] if note else [])
        if key in _TYPES:
            known[key] = entry
    if (streamed := entries.get("streaming")) is not None and streamed.value is True:
        steps = known.get("max_steps")
        if steps is None or steps.value == -1:  # LLaMA-Factory refuses it too: it does not know the number of rows
            problems.add(f"{streamed.where}: streaming needs max_steps. Add a line max_steps: with their number.", "")
    spec = _spec_of(known, problems)
    notes.extend(ineffective_notes(spec, {key for key in known if KEYS[key].asks_for_something(getattr(spec, key))}))
    notes.extend(repeated_notes(spec))
    values = {key: entry.value for key, entry in entries.items()}
    return Recipe(path=path, name=slug(path.stem), values=values, spec=spec, notes=tuple(notes))


class _Problems:
    """All that is wrong with a recipe, and the keys whose values are therefore not known."""

    def __init__(self, path: str) -> None:
        self.texts: list[str] = []
        self.path, self._unknown = path, set[str]()

    def add(self, text: str, written: str) -> None:
        """`written` is the key, or may be a typing mistake of it."""
        self.texts.append(text)
        meant = ALIASES[written].name if written in ALIASES else advice_for(written, _NAMES)[1]
        self._unknown |= {written, meant or written}

    def concerns_unknown(self, key: str, text: str) -> bool:
        """Whether a problem may be gone once the ones before it are: it is about a value that is not known."""
        return not self._unknown.isdisjoint([key, *re.findall(r"\w+", text)])


def _spec_of(known: Mapping[str, Entry], problems: _Problems) -> TrainSpec:
    """What the keys mean.

    Raises:
        RecipeError: Something is wrong with them, or was before.
    """
    for key, example in _REQUIRED.items():
        if key not in known and not problems.concerns_unknown(key, ""):
            problems.add(f"{problems.path}: {key} is missing. Add a line {key}: with {example}.", key)
    values = {key: entry.value for key, entry in known.items()}
    spec = None
    try:
        spec = TrainSpec(**{**_STAND_INS, **values})
    except InvalidValueError as error:
        for key, text in error.problems:
            if not problems.concerns_unknown(key, text):
                where = known[key].where if key in known else problems.path
                problems.texts.append(f"{where}: {text}")
    if problems.texts or spec is None:
        raise RecipeError(all_of(problems.texts))
    return spec


def with_config_files(recipe: Recipe, root: Path) -> Recipe:
    """Replace the files that keys name by their content, which decides instead of the path.

    They are those of `fsdp_config` and `deepspeed`, of JSON, and that of `new_special_tokens_config`, of YAML.

    Raises:
        RecipeError: A file is missing or does not hold a JSON object, or a value in it is invalid.
    """
    read: dict[str, Any] = {}
    if isinstance(name := recipe.spec.new_special_tokens_config, str):
        found = read_yaml(root / name, f"{recipe.path}: new_special_tokens_config: {root / name}")
        read["new_special_tokens_config"] = {token: entry.value for token, entry in found.items()}
    for key in ("fsdp_config", "deepspeed"):
        name = getattr(recipe.spec, key)
        if not isinstance(name, str):
            continue
        path = root / name
        try:
            read[key] = convert(json.loads(path.read_text(encoding="utf-8")), dict[str, Any])
        except OSError as error:
            raise RecipeError(
                f"{recipe.path}: {key} names {path}, which cannot be read ({error.strerror}). Correct the path, which "
                f"is relative to {root}."
            ) from None
        except WrongTypeError:
            raise RecipeError(f"{recipe.path}: {key} names {path}: expected a JSON object. Correct it.") from None
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{recipe.path}: {key} names {path}, which is not JSON ({error}). Correct it.") from None
    try:
        return dataclasses.replace(recipe, spec=dataclasses.replace(recipe.spec, **read)) if read else recipe
    except InvalidValueError as error:
        raise RecipeError(f"{recipe.path}: {error}") from None


def _override_entries(overrides: Mapping[str, object] | Sequence[str] | None) -> dict[str, Entry]:
    if isinstance(overrides, Mapping):
        return {key: Entry(value, _shown(f"override {key}={value!s:.{MAX_SHOWN}}")) for key, value in overrides.items()}
    entries: dict[str, Entry] = {}
    for argument in overrides or ():
        key, equals, text = argument.partition("=")
        where = _shown(f"argument {argument!r}")
        if not equals or not key:
            raise RecipeError(f"{where}: expected key=value, for example max_steps=10.")
        if (earlier := entries.get(key.strip())) is not None:
            raise RecipeError(f"{where}: {key.strip()} is given twice, before in {earlier.where}. Leave one out.")
        entries[key.strip()] = Entry(parse_value(text, where), where)
    return entries


def _shown(where: str) -> str:
    """A place in a recipe or command as messages name it: a value of any length is not repeated whole."""
    text = redacted(where)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _check(written: str, entry: Entry) -> tuple[str, Entry, str | None]:
    """Return a key's present name, its converted value, and a note if it has no effect."""
    name, value = written, entry.value
    if written in ALIASES:
        name, value = ALIASES[written].name, ALIASES[written].convert(value)
    if name not in KEYS:
        raise RecipeError(f"{entry.where}: unknown key {written!r}. {advice_for(written, _NAMES)[0]}")
    key = KEYS[name]
    if name == "interleave_probs" and isinstance(value, list):
        value = ",".join(map(str, value))
    try:
        value = convert(value, key.annotation)
    except WrongTypeError as error:
        raise RecipeError(f"{entry.where}: {written}: {error}. {value_advice(name, value)}") from None
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
            "which stays inside it, or an absolute path to another folder."
        )
    if name in _PATHS - {"output_dir"} and isinstance(value, str) and not _can_be_path(value):
        raise RecipeError(
            f"{entry.where}: {written} {value[:40]!r} cannot be a path: it has a character that is not printable, "
            "or is too long. Correct it."
        )
    return name, Entry(value, entry.where), note


def _can_be_path(text: str) -> bool:
    longest = max(len(part.encode()) for part in re.split("[/,]", text))
    return text.isprintable() and longest <= MAX_NAME_BYTES and len(text.encode()) <= MAX_PATH_BYTES
