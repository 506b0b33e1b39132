"""What an asset reads of the assets above it: the metadata of their latest materialisation."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets.artifacts import is_complete, read_manifest, require_sound
from mllm_assets.components.facts import facts_of
from mllm_assets.components.resources import ProjectResource
from mllm_assets.components.wiring import PREFERENCES, Node
from mllm_assets.data.curate.leaks import release_leaks, stages_of
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import IntegrityError
from mllm_assets.project.read import materialize_command
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.releases.model_card import BaseModelLineage, Origin

# with another of these a model is asked about other tokens than it learnt
LEARNT_AND_ASKED = ("dataset", "media_dir", "default_system", *TurnSettings.__slots__)


def upstream(context: dg.AssetExecutionContext, key: dg.AssetKey) -> dict[str, Any]:
    """Return the metadata values of `key`'s latest materialisation, with its data version as `data_version`.

    Raises:
        IntegrityError: It was never materialised. Gives the command.
    """
    event = context.instance.get_latest_materialization_event(key)
    if event is None or event.asset_materialization is None:
        raise IntegrityError(
            f"{key.to_user_string()} was never materialised. Run: {materialize_command(key.to_user_string())}"
        )
    materialization = event.asset_materialization
    return {
        **facts_of(materialization.metadata),
        "data_version": (materialization.tags or {}).get("dagster/data_version"),
    }


def as_trained(context: dg.AssetExecutionContext, node: Node) -> TrainSpec:
    """The recipe with what the latest checkpoint learnt, and how it was asked; a trial may have other values.

    What judges is the file's.
    """
    overrides = upstream(context, node.key("checkpoint")).get("overrides") or {}
    return replace(node.recipe.spec, **{key: overrides[key] for key in LEARNT_AND_ASKED if key in overrides})


def upstream_path(
    context: dg.AssetExecutionContext,
    key: dg.AssetKey,
    project: ProjectResource,
    *,
    name: str = "path",
    deep: bool = True,
) -> Path:
    """Return the directory that `key` published, pulled from the artefact store if another machine made it.

    It is never a link that a later run may move. Sizes of its files are compared with the manifest, if `deep` digests.

    Raises:
        IntegrityError: It is gone, or a file in it is not as it was written. Gives the command that makes it again.
    """
    values = upstream(context, key)
    directory = project.layout.root / values[name]
    if (mirror := project.mirror(context)) and "path" in values:
        mirror.pull(project.layout.root / values["path"])
    again = f"Make it again: {materialize_command(key.to_user_string())}"
    if not directory.is_dir():
        raise IntegrityError(f"{directory} of {key.to_user_string()} is gone. {again}")
    # whoever loads a run's model verifies that
    if key.path[-1] != "checkpoint" and is_complete(directory):
        require_sound(directory, again, deep=deep)
    return directory


def pull_data(context: dg.AssetExecutionContext, keys: Iterable[dg.AssetKey], project: ProjectResource) -> None:
    """Switch a recipe's datasets to the version that their `dataset_info` last had, if there is an artefact store."""
    mirror = project.mirror(context)
    if mirror is None:
        return
    for key in keys:
        if key.path[-1] == PREFERENCES:
            continue  # not kept in the store: the machine that trains on a model's mistakes asks it
        # entries written by hand have no materialisation, and are where the user put them
        if context.instance.get_latest_materialization_event(key) is not None:
            mirror.pull_data(key.path[0], upstream(context, key)["data_version"])


def run_columns(context: dg.AssetExecutionContext, recipe: str, weights_digest: str) -> dict[str, str]:
    """The columns that identify a run in the tables of predictions and metrics."""
    return {"run_id": context.run.run_id, "recipe": recipe, "checkpoint_digest": weights_digest}


def line_versions(context: dg.AssetExecutionContext, node: Node) -> dict[str, str]:
    """Asset -> data version of everything that a release is made from, as last materialised, the first stage first."""
    of_data = f"raw sample_quality corrections train val test dataset_info {PREFERENCES}".split()
    datasets = dict.fromkeys(key.path[0] for key in (*node.ancestor_data, *node.data))
    own = "vision_features checkpoint predictions eval_metrics".split()
    keys = [dg.AssetKey([dataset, name]) for dataset in datasets for name in of_data]
    found = {}
    for key in (*keys, node.model, *map(node.key, own), *node.judged_by_benchmarks):
        event = context.instance.get_latest_materialization_event(key)
        if event is not None and event.asset_materialization is not None:
            version = (event.asset_materialization.tags or {}).get("dagster/data_version")
            found |= {key.to_user_string(): version} if version else {}
    return found


def model_directory(
    context: dg.AssetExecutionContext, node: Node, project: ProjectResource, *, deep: bool = False
) -> Path:
    """The directory of the model that a recipe starts from, as last published.

    A worker that trains it or asks it reads every byte itself, and compares.
    """
    return upstream_path(context, node.model, project, name="model_path", deep=deep)


def find_origin(context: dg.AssetExecutionContext, node: Node) -> Origin:
    """Describe the model that a recipe starts from as it is now, and the pretrained one that its chain began with.

    The output of another recipe has the licence of the pretrained model, but not its Hub id: it is another model.
    """
    facts = upstream(context, node.model)
    pretrained = facts.get("pretrained_model")  # of the output of another recipe
    source = {"license": pretrained["license"]} if pretrained else facts
    model: BaseModelLineage = {
        "name": node.recipe.spec.model_name_or_path,
        "fingerprint": facts["data_version"] or "",
        "hub_id": source.get("hub_id") or None,
        "revision": source.get("revision") or None,
        "license": source.get("license") or None,
    }
    return {"base_model": model, "pretrained_model": pretrained or model}


def find_leaks(
    context: dg.AssetExecutionContext,
    node: Node,
    project: ProjectResource,
    dataset: Dataset,
    evaluated_digests: Mapping[str, str],
) -> list[str]:
    """What leaked from the evaluation into the training, found in the files on disk; empty if nothing did.

    `evaluated_digests` has the digest of each entry that judges when the predictions were made.
    """
    run = read_manifest(upstream_path(context, node.key("checkpoint"), project))
    return release_leaks(
        dataset,
        as_trained(context, node).train_entries,
        list(evaluated_digests),
        run["data_digests"],
        evaluated_digests,
        store=project.quality_store,
        stages=stages_of(run, project.layout.root)[:-1],
    )
