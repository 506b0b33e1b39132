"""YAML as LLaMA-Factory reads it, with the line of every key.

LLaMA-Factory loads recipes with OmegaConf: `1e-4` is a number (plain PyYAML makes it a string), dates stay strings,
duplicate keys are refused.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mllm_assets.errors import RecipeError

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


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True, slots=True)
class Entry:
    """One top-level key's value and where it stands: `configs/a.yaml:12`, or `key=value` of a command line."""

    value: Any
    where: str


def parse_yaml(text: str, name: str) -> dict[str, Entry]:
    """Read a mapping. `name` is how messages call the file.

    Raises:
        RecipeError: Not YAML, not a mapping, or a key that stands twice. Names file and line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise RecipeError(_syntax_message(error, name)) from None
    except RecursionError:
        raise RecipeError(f"{name} is nested too deeply. Write a recipe: lines of `key: value`.") from None
    if node is None:
        raise RecipeError(f"{name} is empty. Write a LLaMA-Factory recipe into it, for example a copy from configs/.")
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{name}:{node.start_mark.line + 1}: expected lines of `key: value`. Write one key per line.")
    entries: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        where = f"{name}:{key_node.start_mark.line + 1}"
        key = str(loader.construct_object(key_node, deep=True))
        if key in entries:
            raise RecipeError(f"{where}: {key} stands a second time; the first is {entries[key].where}. Delete one.")
        try:
            entries[key] = Entry(loader.construct_object(value_node, deep=True), where)
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(f"{where}: the value of {key} cannot be read ({_problem(error)}). Mend it.") from None
    return entries


def read_yaml(path: Path, name: str) -> dict[str, Entry]:
    """Read a recipe file.

    Raises:
        RecipeError: As `parse_yaml`, or the file is missing, a directory, or not UTF-8 text.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), name)
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
