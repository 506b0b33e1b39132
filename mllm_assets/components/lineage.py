"""What an asset reads of the assets above it: the metadata of their latest materialisation."""

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets.components.resources import ProjectResource
from mllm_assets.errors import IntegrityError
from mllm_assets.project.read import materialize_command


def upstream(context: dg.AssetExecutionContext, key: dg.AssetKey) -> dict[str, Any]:
    """Return the metadata values of `key`'s latest materialisation, with its data version as `data_version`.

    Raises:
        IntegrityError: It was never materialised. Says the command that does it.
    """
    event = context.instance.get_latest_materialization_event(key)
    if event is None or event.asset_materialization is None:
        raise IntegrityError(
            f"{key.to_user_string()} was never materialised. Run: {materialize_command(key.to_user_string())}"
        )
    materialization = event.asset_materialization
    values = {name: value.value for name, value in materialization.metadata.items()}
    return {**values, "data_version": (materialization.tags or {}).get("dagster/data_version")}


def upstream_path(
    context: dg.AssetExecutionContext, key: dg.AssetKey, project: ProjectResource, *, name: str = "path"
) -> Path:
    """Return the directory that `key` published, never a link that a later run may move.

    What was made on another machine is fetched from the artefact store.
    """
    values = upstream(context, key)
    directory = project.layout.root / values[name]
    if (mirror := project.mirror(context)) and "path" in values:
        mirror.bring(project.layout.root / values["path"])
    if not directory.is_dir():
        raise IntegrityError(
            f"{directory} of {key.to_user_string()} is gone. Materialise {key.to_user_string()} again."
        )
    return directory


def bring_data(context: dg.AssetExecutionContext, keys: Iterable[dg.AssetKey], project: ProjectResource) -> None:
    """Let the datasets that a recipe reads be here what their `dataset_info` last was, where there is a store."""
    mirror = project.mirror(context)
    if mirror is None:
        return
    for key in keys:
        # entries written by hand have no materialisation, and are where a person put them
        if context.instance.get_latest_materialization_event(key) is not None:
            mirror.bring_data(key.path[0], upstream(context, key)["data_version"])


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a model computes."""
    names = ("mllm-assets", "torch", "transformers", "accelerate", "peft", "dagster")
    return {name: version(name) for name in names}


def run_columns(context: dg.AssetExecutionContext, recipe: str, weights_digest: str) -> dict[str, str]:
    """What names a run in the tables of predictions and metrics."""
    return {"run_id": context.run.run_id, "recipe": recipe, "checkpoint_digest": weights_digest}
