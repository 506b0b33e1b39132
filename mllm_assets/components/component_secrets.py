"""A secret in a `defs.yaml` is refused: what stands there stands in the UI, in metadata and on model cards."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from dagster_shared.yaml_utils import parse_yamls_with_source_position

from mllm_assets.components.reporting import failing_asset
from mllm_assets.errors import RecipeError
from mllm_assets.redaction import holds_secret

ADVICE = (
    "holds what looks like a token or password. What a defs.yaml says stands in the UI, in metadata and model cards: "
    "delete it here and set an environment variable, such as HF_TOKEN."
)
Place = tuple[str | int, ...]


def secret_places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Where in a JSON-able value a text holds a secret, as keys and indices."""
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


def refused_for_secret(
    component: dg.Model, context: dg.ComponentLoadContext, key: dg.AssetKey, group: str
) -> dg.Definitions | None:
    """An asset that fails with the reason in place of a component that holds a secret; None where there is none.

    Its values are looked at as they were resolved: `{{ env.HF_TOKEN }}` puts one there that the file does not show.
    """
    place = next(secret_places(component.model_dump(), ("attributes",)), None)
    if place is None:
        return None
    path = context.path if context.path.is_file() else context.path / "defs.yaml"
    error = RecipeError(f"{path.relative_to(context.project_root)}{_line(path, place)}: {shown_place(place)} {ADVICE}")
    return dg.Definitions(assets=[failing_asset(key, group, error)])


def _line(path: Path, place: Place) -> str:
    """`:line` of a place, where one document of the file holds a secret there or a template in its stead."""
    try:
        documents = parse_yamls_with_source_position(path.read_text(encoding="utf-8"), filename=path.name)
    except (OSError, yaml.YAMLError):
        return ""
    if len(documents) != 1:  # which of them the component is nobody says
        return ""
    position = documents[0].source_position_tree.lookup(list(place))
    return f":{position.start.line}" if position else ""
