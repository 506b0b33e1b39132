"""The assets of one recipe, and the external ones that it may read."""

import dagster as dg

from mllm_assets.components.assets.benchmarks import benchmarks_asset
from mllm_assets.components.assets.checkpoint import checkpoint_asset
from mllm_assets.components.assets.copies import gguf_asset, quantized_asset
from mllm_assets.components.assets.evaluation import eval_metrics_asset, predictions_asset
from mllm_assets.components.assets.gained import what_it_gained_asset
from mllm_assets.components.assets.lineage import model_directory, pull_data
from mllm_assets.components.assets.preferences import preferences_asset
from mllm_assets.components.assets.registry import mlflow_model_asset
from mllm_assets.components.assets.release import hub_model_asset, released_model_asset
from mllm_assets.components.assets.step import as_dagster_failures, step
from mllm_assets.components.assets.sweep import sweep_asset
from mllm_assets.components.resources import AcceleratorResource, ProjectResource
from mllm_assets.components.wiring import Node
from mllm_assets.data.sharegpt.dataset import Dataset, media_dir_of
from mllm_assets.worker.tasks import FeaturesTask


def build_recipe_assets(node: Node) -> list[dg.AssetsDefinition]:
    """Make a recipe's assets. Without `eval_dataset` the last is the checkpoint: nothing could judge a release."""
    assets = [vision_features_asset(node)] if node.has_features else []
    assets.append(checkpoint_asset(node))
    if node.settings.preferences:
        assets.append(preferences_asset(node))
    if node.settings.sweep is not None:
        assets.append(sweep_asset(node, node.settings.sweep.to_spec()))
    if node.settings.benchmarks is not None:
        assets.append(benchmarks_asset(node, node.settings.benchmarks.to_spec()))
    if node.eval_data:
        assets += [predictions_asset(node), eval_metrics_asset(node), released_model_asset(node)]
        if node.settings.what_it_gained:
            assets.append(what_it_gained_asset(node))
        if node.settings.push_to_hub is not None:
            assets.append(hub_model_asset(node, node.settings.push_to_hub.to_spec()))
        if node.settings.quantized is not None:
            assets.append(quantized_asset(node, node.settings.quantized.to_spec()))
        if node.settings.gguf is not None:
            assets.append(gguf_asset(node, node.settings.gguf.to_spec()))
        if node.settings.mlflow_registry is not None:
            assets.append(mlflow_model_asset(node, node.settings.mlflow_registry.to_spec()))
    return assets


def external_asset(entry: str, key: dg.AssetKey, media_dir: str | None = None) -> dg.SourceAsset:
    """An entry that a user wrote into `dataset_info.json`: external, observed for changes of its files and images.

    `media_dir` is that of a recipe that names the entry.
    """

    @dg.observable_source_asset(
        key=key, group_name=key.path[0], description=f"The entry {entry} of data/dataset_info.json, written by hand."
    )
    @as_dagster_failures()
    def external(project: ProjectResource) -> dg.DataVersion:
        layout = project.layout
        dataset = Dataset(layout.data, media_dir=layout.root / media_dir if media_dir else None)
        return dg.DataVersion(dataset.entry(entry).digest)

    return external


def vision_features_asset(node: Node) -> dg.AssetsDefinition:
    """The frozen tower's output for every image of the recipe, shared by all recipes with the same tower and images."""
    spec = node.recipe.spec

    @dg.asset(
        key=node.key("vision_features"),
        group_name="train",
        kinds={"safetensors"},
        deps=[*node.data, node.model],
        pool="gpu",
        description=f"{node.name}: pooled output of the frozen vision tower for each image, computed once and "
        "content-addressed.",
    )
    @step
    def vision_features(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        layout = project.layout
        pull_data(context, node.data, project)
        if mirror := project.mirror(context):
            mirror.pull_features(node.name)
        task = FeaturesTask(
            recipe=spec,
            model_dir=model_directory(context, node, project, deep=True),
            data_dir=layout.root / spec.dataset_dir,
            media_dir=media_dir_of(spec, layout.root),
            features_root=layout.features,
        )
        result = gpu.run(context, task)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(result.digest),
            metadata={
                "num_images": result.num_images,
                "num_images_computed": result.num_computed,
                "size_mib": round(result.num_bytes / 2**20, 2),
                "tower_fingerprint": result.tower_fingerprint,
                "path": layout.relative(layout.features / result.directory),
            },
        )

    return vision_features
