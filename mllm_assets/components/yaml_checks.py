"""Mistakes in the `defs.yaml` files of a project, each by file and line.

`dg check yaml` (1.13) keeps one file of each type of component, so of four datasets it checks only the last.
"""

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import yaml
from dagster_shared.yaml_utils import parse_yamls_with_source_position
from dagster_shared.yaml_utils.source_position import ValueAndSourcePositionTree

from mllm_assets.components.reporting import failing_asset
from mllm_assets.errors import RecipeError, did_you_mean, nearest
from mllm_assets.project.read import root_module
from mllm_assets.redaction import holds_secret, redacted
from mllm_assets.safe_yaml import LimitError, load_all

if TYPE_CHECKING:
    from jsonschema import ValidationError

ADVICE = (
    "holds what looks like a token or password. The UI, metadata and model cards show what is in a defs.yaml: delete "
    "it here and set an environment variable, such as HF_TOKEN."
)
TEXT, TEMPLATE = "string", r"\{\{"
Place = tuple[str | int, ...]


def find_mistakes(project: Path) -> list[str]:
    """Check each `defs.yaml` with the schemas that Dagster loads it with; return `file:line: what is wrong`."""
    defs = project / root_module(project).replace(".", "/") / "defs"
    mistakes = []
    for path in sorted(defs.rglob("defs.yaml")):
        shown = path.relative_to(project)
        try:
            load_all(path)  # applies the limits; Dagster's reader has none
            documents = parse_yamls_with_source_position(path.read_text(encoding="utf-8"), filename=str(shown))
        except LimitError as error:
            mistakes.append(f"{shown}:1: cannot be read: {error}")
            continue
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            mistakes.append(f"{shown}:{line}: this is not YAML: {error.problem}")
            continue
        except (OSError, ValueError, yaml.YAMLError) as error:  # a directory, other bytes than UTF-8, a NUL
            mistakes.append(f"{shown}:1: cannot be read as text in YAML: {' '.join(str(error).split())[:200]}")
            continue
        if not documents:
            mistakes.append(f"{shown}:1: is empty. Write a component into it, or delete it")
        for document in documents:
            mistakes += (f"{shown}:{line}: {text}" for line, text in _mistakes_of(document))
    return mistakes


def _mistakes_of(document: ValueAndSourcePositionTree) -> Iterator[tuple[int, str]]:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    value = document.value if isinstance(document.value, dict) else {}
    for place in secret_places(value):
        yield _line(document, list(place)), f"{shown_place(place)} {ADVICE}"
    kind = value.get("type")
    if not isinstance(kind, str):
        yield 1, "`type:` is missing, for example mllm_assets.components.ImageTextDataset"
        return
    if kind.startswith("."):  # a component in the same folder
        return
    module, _, name = kind.rpartition(".")
    try:
        model = getattr(importlib.import_module(module), name).get_model_cls()
    except (ImportError, AttributeError, ValueError):
        yield (
            _line(document, ["type"]),
            f"the component {kind} does not exist; see `dg list components`",
        )
        return
    validator = Draft202012Validator(_without_texts(model.model_json_schema()) if model else {})
    for error in validator.iter_errors(value.get("attributes", {})):
        best = best_match([error]) or error
        place = ["attributes", *best.absolute_path]
        yield _line(document, place), f"{shown_place(tuple(place))}: {redacted(_said(best))}{_hint(best)}"


def _without_texts(schema: Any) -> Any:
    """The schema in which what is no text may be a text only where that is a template.

    Dagster allows a text everywhere, behind what is meant, and then ends in pydantic's traceback.
    """
    if isinstance(schema, list):
        return [_without_texts(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _without_texts(value) for key, value in schema.items()}
    either = found.get("anyOf", [])
    kinds = [one.get("type", "object") for one in either]
    if TEXT in kinds and kinds[0] in ("array", "object"):
        found["anyOf"] = [one | {"pattern": TEMPLATE} if one.get("type") == TEXT else one for one in either]
    return found


def _said(error: "ValidationError") -> str:
    parent = error.parent
    if error.validator_value != TEMPLATE or parent is None or not isinstance(parent.schema, dict):
        return error.message
    is_list = any(one.get("type") == "array" for one in parent.schema["anyOf"])
    cure = f"Write a list: [{error.instance}]" if is_list else "Write keys and values below it"
    return f"{error.instance!r} is a text. {cure}"


def _hint(error: "ValidationError") -> str:
    """For each key that its object does not have, the one that it may be a typing mistake of."""
    if error.validator != "additionalProperties" or not isinstance(error.schema, dict):
        return ""
    assert isinstance(error.instance, dict)  # what has properties
    known = error.schema.get("properties", {})
    unknown = [name for name in error.instance if name not in known]
    return "".join(f". {did_you_mean(name, known)}".rstrip() for name in unknown if nearest(name, known))


def _line(document: ValueAndSourcePositionTree, place: list[str | int]) -> int:
    position = document.source_position_tree.lookup(place)
    return position.start.line if position else 1


def secret_places(value: Any, place: Place = ()) -> Iterator[Place]:
    """The places in a JSON-able value whose text holds a secret, as keys and indices."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from secret_places(item, (*place, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from secret_places(item, (*place, index))
    elif holds_secret(value):
        yield place


def shown_place(place: Place) -> str:
    """A place as messages name it: `attributes.models.0.license`."""
    return ".".join(str(part) for part in place)


def refuse_secrets(component: dg.Model, context: dg.ComponentLoadContext, key: dg.AssetKey) -> dg.Definitions | None:
    """An asset that fails with the reason, instead of a component that holds a secret; None if it holds none.

    Checks the resolved values: `{{ env.HF_TOKEN }}` gives a secret that the file does not show.
    """
    place = next(secret_places(component.model_dump(), ("attributes",)), None)
    if place is None:
        return None
    path = context.path if context.path.is_file() else context.path / "defs.yaml"
    error = RecipeError(
        f"{path.relative_to(context.project_root)}{_line_suffix(path, place)}: {shown_place(place)} {ADVICE}"
    )
    return dg.Definitions(assets=[failing_asset(key, error)])


def _line_suffix(path: Path, place: Place) -> str:
    """`:line` of a place, if the file has one document, which has that place."""
    try:
        documents = parse_yamls_with_source_position(path.read_text(encoding="utf-8"), filename=path.name)
    except (OSError, yaml.YAMLError):
        return ""
    if len(documents) != 1:  # Dagster does not say which of them is the component
        return ""
    position = documents[0].source_position_tree.lookup(list(place))
    return f":{position.start.line}" if position else ""
