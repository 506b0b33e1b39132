"""The assets of one recipe, and the external ones that it may read."""

from dataclasses import dataclass

import dagster as dg

from mllm_assets.components.checkpoint_asset import checkpoint_asset
from mllm_assets.components.eval_metrics_asset import eval_metrics_asset
from mllm_assets.components.hub_model_asset import hub_model_asset
from mllm_assets.components.predictions_asset import EvaluationSettings, predictions_asset
from mllm_assets.components.released_model_asset import released_model_asset
from mllm_assets.components.resources import ProjectResource, failures_for_people
from mllm_assets.components.vision_features_asset import vision_features_asset
from mllm_assets.components.wiring import Node
from mllm_assets.data.sharegpt import entry_digest
from mllm_assets.evaluation.gates import GateSpec
from mllm_assets.evaluation.hub_push import PushSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeSettings:
    """What a recipe's line needs beside the recipe; see `components.fine_tuning.Settings`."""

    feature_cache: bool
    max_hidden_states_gib: float
    allow_leakage: bool
    regroup_micro_batches: bool
    evaluation: EvaluationSettings
    gates: GateSpec
    push_to_hub: PushSpec | None = None


def build_recipe_assets(node: Node, settings: RecipeSettings) -> list[dg.AssetsDefinition]:
    """Make a recipe's line. Without `eval_dataset` it ends at the checkpoint: nothing could judge a release."""
    with_features = settings.feature_cache and node.recipe.spec.freeze_vision_tower
    assets = [vision_features_asset(node)] if with_features else []
    assets.append(
        checkpoint_asset(
            node,
            settings.gates,
            with_features=with_features,
            feature_cache=settings.feature_cache,
            max_hidden_states_gib=settings.max_hidden_states_gib,
            allow_leakage=settings.allow_leakage,
            regroup=settings.regroup_micro_batches,
        )
    )
    if node.eval_data:
        assets.append(predictions_asset(node, settings.evaluation, feature_cache=settings.feature_cache))
        assets.append(eval_metrics_asset(node, settings.gates, allow_leakage=settings.allow_leakage))
        assets.append(released_model_asset(node, settings.gates, allow_leakage=settings.allow_leakage))
        if settings.push_to_hub is not None:
            assets.append(hub_model_asset(node, settings.push_to_hub))
    return assets


def hand_written_asset(entry: str, key: dg.AssetKey) -> dg.SourceAsset:
    """An entry that a user wrote into `dataset_info.json`: external, observed for changes of its files and images."""

    @dg.observable_source_asset(
        key=key, group_name="ingest", description=f"The entry {entry} of data/dataset_info.json, written by hand."
    )
    def hand_written(project: ProjectResource) -> dg.DataVersion:
        with failures_for_people():
            return dg.DataVersion(entry_digest(project.layout.data, entry))

    return hand_written
