"""The model that a recipe starts from: where it lies, and what it and the first of its line were.

A checkpoint records both in its metadata, since the assets above it may be made anew before it is released.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets.components.lineage import upstream, upstream_path
from mllm_assets.components.resources import ProjectResource
from mllm_assets.components.wiring import Node
from mllm_assets.evaluation.model_card import BaseModelLineage, Origin


def model_directory(context: dg.AssetExecutionContext, node: Node, project: ProjectResource) -> Path:
    """The directory of the model that a recipe starts from, as its asset last published it."""
    return upstream_path(context, node.model, project, name="model_path")


def find_origin(context: dg.AssetExecutionContext, node: Node) -> Origin:
    """Describe the model that a recipe starts from as it is now, and the pretrained one that its line began with.

    The output of another recipe has the licence of what that began with, but not its Hub id: it is another model.
    """
    facts = upstream(context, node.model)
    name = node.recipe.spec.model_name_or_path
    if node.model.path[0] == "pretrained":
        model = _described(name, facts, facts)
        return {"base_model": model, "pretrained_model": model}
    pretrained = facts["pretrained_model"]
    return {
        "base_model": _described(name, facts, {"license": pretrained["license"]}),
        "pretrained_model": pretrained,
    }


def recorded_origin(context: dg.AssetExecutionContext, node: Node) -> Origin:
    """What `find_origin` said when the recipe's checkpoint was made."""
    recorded = upstream(context, node.key("checkpoint"))
    return {"base_model": recorded["base_model"], "pretrained_model": recorded["pretrained_model"]}


def _described(name: str, facts: Mapping[str, Any], source: Mapping[str, Any]) -> BaseModelLineage:
    return {
        "name": name,
        "fingerprint": facts["data_version"] or "",
        "hub_id": source.get("hub_id") or None,
        "revision": source.get("revision") or None,
        "license": source.get("license") or None,
    }
