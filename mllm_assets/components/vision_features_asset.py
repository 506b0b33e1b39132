"""`<recipe>/vision_features`."""

import dagster as dg

from mllm_assets.components.lineage import bring_data
from mllm_assets.components.resources import AcceleratorResource, ProjectResource, failures_for_people
from mllm_assets.components.starting_model import model_directory
from mllm_assets.components.wiring import Node


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
    def vision_features(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        layout = project.layout
        with failures_for_people():
            bring_data(context, node.data, project)
            if mirror := project.mirror(context):
                mirror.bring_features(node.name)
            request = {
                "task": "vision_features",
                "recipe": spec.to_dict(),
                "model_dir": str(model_directory(context, node, project)),
                "data_dir": str(layout.root / spec.dataset_dir),
                "entries": [*spec.train_entries, *spec.eval_entries],
                "features_root": str(layout.features),
            }
        result = gpu.run(context, request)
        return project.recorded(
            context,
            dg.MaterializeResult(
                data_version=dg.DataVersion(result["digest"]),
                metadata={
                    "num_images": result["num_images"],
                    "num_images_computed": result["num_computed"],
                    "size_mib": round(result["num_bytes"] / 2**20, 2),
                    "tower_fingerprint": result["tower_fingerprint"],
                    "path": layout.relative(layout.features / result["directory"]),
                },
            ),
        )

    return vision_features
