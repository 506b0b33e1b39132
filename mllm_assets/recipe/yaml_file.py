"""YAML as LLaMA-Factory reads it, with the line of every key.

LLaMA-Factory loads recipes with OmegaConf: `1e-4` is a number (plain PyYAML makes it a string), dates stay strings,
duplicate keys are refused.
"""

import re
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mllm_assets.errors import RecipeError, all_of
from mllm_assets.safe_yaml import LimitError, SafeLoader, read_text

# OmegaConf 2.3, `_utils.get_yaml_loader`
_FLOAT = re.compile(
    r"""^(?:
     [-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |\.[0-9_]+(?:[eE][-+][0-9]+)?
    |[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_WORDS[dict] = "a mapping of names to values of JSON"
_WORDS[type(None)] = "null"
_PLAIN_KEY = "tag:yaml.org,2002:str"
MAX_INT = 2**63 - 1  # what numpy, torch and Arrow hold
MAX_SHOWN = 80  # characters of a value in a message


class _Loader(SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True, slots=True)
class Entry:
    """One top-level key's value and where it is written: `configs/a.yaml:12`, or `key=value` of a command line."""

    value: Any
    where: str


def parse_yaml(text: str, name: str, problems: list[str] | None = None) -> dict[str, Entry]:
    """Read a mapping. `name` is the file's name in messages; `problems` gets what is wrong with single keys.

    Raises:
        RecipeError: Not YAML, not a mapping, or, without `problems`, a duplicate key. Names file and line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except LimitError as error:
        raise RecipeError(f"{name} is not read: {error}. Write a recipe: lines of `key: value`.") from None
    except yaml.YAMLError as error:
        raise RecipeError(_syntax_message(error, name)) from None
    if node is None:
        raise RecipeError(f"{name} is empty. Write a LLaMA-Factory recipe into it, for example a copy from configs/.")
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{name}:{node.start_mark.line + 1}: expected lines of `key: value`. Write one key per line.")
    entries: dict[str, Entry] = {}
    wrong = [] if problems is None else problems
    for key_node, value_node in node.value:
        where = f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _PLAIN_KEY:
            found = f"{key_node.value[:MAX_SHOWN]!r}" if isinstance(key_node, yaml.ScalarNode) else f"a {key_node.id}"
            wrong.append(f"{where}: expected a key's name, found {found}. Write one `key: value` per line.")
            continue
        if (key := key_node.value) in entries:
            wrong.append(f"{where}: {key} is set a second time; the first is {entries[key].where}. Delete one.")
            continue
        try:
            entries[key] = Entry(loader.construct_object(value_node, deep=True), where)
        except yaml.YAMLError as error:
            wrong.append(f"{where}: the value of {key} cannot be read ({_problem(error)}). Correct it.")
    if problems is None and wrong:
        raise RecipeError(all_of(wrong))
    return entries


def read_yaml(path: Path, name: str, problems: list[str] | None = None) -> dict[str, Entry]:
    """Read a recipe file.

    Raises:
        RecipeError: As `parse_yaml`, or the file is missing, a directory, or not UTF-8 text.
    """
    try:
        return parse_yaml(read_text(path), name, problems)
    except FileNotFoundError:
        near = path.parent / "configs" / f"{path.name}.yaml"
        cure = f"Did you mean {near}?" if near.is_file() else "Check the path, or run from the project's root."
        raise RecipeError(f"There is no recipe {name}. {cure}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{name} cannot be read as a text file ({error}). Name a YAML file.") from None


def parse_value(text: str, where: str) -> Any:
    """Read the value of a `key=value` argument as YAML, as `llamafactory-cli` does."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a subclass of SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: the value cannot be read as YAML ({_problem(error)}). Quote it.") from None


def _syntax_message(error: yaml.YAMLError, name: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return (
            f"{name}:{mark.line + 1}: this is not YAML, at column {mark.column + 1}: {_problem(error)}. "
            "Look at that line and the one before it: a missing space after a colon, a tab or an open quote."
        )
    return f"{name}: this is not YAML: {_problem(error)}. Save the file as plain UTF-8 text."


def _problem(error: Exception) -> str:
    problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error).partition("\n")[0]
    return " ".join((problem or "unknown problem").split())


class WrongTypeError(ValueError):
    """The value does not fit; the text says what was expected and what was found."""


def convert(value: Any, annotation: Any) -> Any:
    """Return `value` as the annotated type, where YAML's own type says the same thing.

    An integral float serves as int (`1e3`), an int as float, a list of strings as a comma list. A string never
    becomes a number or a boolean.

    Raises:
        WrongTypeError: It does not fit.
    """
    if annotation is Any:
        if not _is_json(value):
            raise WrongTypeError(f"expected a value of JSON, got {_shown(value)}")
        return value
    options = _options(annotation)
    if value is None and type(None) in options:
        return None
    literals = [choice for option in options if typing.get_origin(option) is Literal for choice in option.__args__]
    if literals and isinstance(value, bool) and value is False and "no" in literals:
        return "no"  # YAML reads a bare `no` as false; transformers would fail on it
    if literals and value in literals:
        return value
    for option in options:
        fits, converted = _as_plain(value, typing.get_origin(option) or option)
        if fits:
            return converted
    raise WrongTypeError(f"expected {describe(annotation)}, got {_shown(value)}")


def describe(annotation: Any) -> str:
    """The type in words for a message."""
    words = []
    for option in _options(annotation):
        if typing.get_origin(option) is Literal:
            words.append("one of " + ", ".join(map(str, option.__args__)))
        else:
            words.append(_WORDS.get(typing.get_origin(option) or option, "another value"))
    return " or ".join(words)


def _options(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return annotation.__args__ if is_union else (annotation,)


def _as_plain(value: Any, kind: Any) -> tuple[bool, Any]:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number:
        return abs(value) <= sys.float_info.max, value  # no NaN either
    if kind is int and is_number:
        is_integer = abs(value) <= MAX_INT and int(value) == value
        return is_integer, int(value) if is_integer else value
    if kind is str and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return True, ",".join(value)
    if kind is dict and isinstance(value, dict):
        return _is_json(value), value
    if kind in (bool, str):
        return isinstance(value, kind), value
    return False, value


def _is_json(value: Any) -> bool:
    """Whether JSON has all of a value: no dates, bytes, sets, NaN, nor keys that are no text."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return value is None or isinstance(value, bool | str)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    text = f"{'the text ' if isinstance(value, str) else ''}{value!r}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} (cut)"
