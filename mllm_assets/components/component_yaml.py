"""Mistakes in the `defs.yaml` files of a project, each by file and line.

`dg check yaml` (1.13) keeps one file of each type of component, so that of four datasets it looks at the last only.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path

import yaml
from dagster_shared.yaml_utils import parse_yamls_with_source_position
from dagster_shared.yaml_utils.source_position import ValueAndSourcePositionTree

from mllm_assets.components.component_secrets import ADVICE, secret_places, shown_place
from mllm_assets.project.read import root_module
from mllm_assets.redaction import redacted


def find_mistakes(project: Path) -> list[str]:
    """Say what is wrong in each `defs.yaml`: `file:line: what`, from the schemas that Dagster loads them with."""
    defs = project / root_module(project).replace(".", "/") / "defs"
    mistakes = []
    for path in sorted(defs.rglob("defs.yaml")):
        shown = path.relative_to(project)
        try:
            documents = parse_yamls_with_source_position(path.read_text(encoding="utf-8"), filename=str(shown))
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            mistakes.append(f"{shown}:{line}: this is not YAML: {error.problem}")
            continue
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
    if kind.startswith("."):  # a component beside its YAML
        return
    module, _, name = kind.rpartition(".")
    try:
        model = getattr(importlib.import_module(module), name).get_model_cls()
    except (ImportError, AttributeError):
        yield _line(document, ["type"]), f"there is no component {kind}; `dg list components` shows those there are"
        return
    for error in Draft202012Validator(model.model_json_schema() if model else {}).iter_errors(
        value.get("attributes", {})
    ):
        best = best_match([error]) or error
        place = ["attributes", *best.absolute_path]
        yield _line(document, place), f"{shown_place(tuple(place))}: {redacted(best.message)}"


def _line(document: ValueAndSourcePositionTree, place: list[str | int]) -> int:
    position = document.source_position_tree.lookup(place)
    return position.start.line if position else 1
