"""`<dataset>/dataset_info`: the dataset's entries, under which recipes name it."""

import dagster as dg

from mllm_assets.components.lineage import upstream_path
from mllm_assets.components.resources import ProjectResource, failures_for_people
from mllm_assets.data.dataset_info import register
from mllm_assets.data.spec import DatasetSpec


def dataset_info_asset(spec: DatasetSpec) -> dg.AssetsDefinition:
    train_key, val_key = dg.AssetKey([spec.name, "train"]), dg.AssetKey([spec.name, "val"])

    @dg.asset(
        key=[spec.name, "dataset_info"],
        group_name="curate",
        kinds={"json"},
        deps=[train_key, val_key],
        description=f"The entries {spec.train_entry} and {spec.val_entry} of data/dataset_info.json.",
    )
    def dataset_info(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        with failures_for_people():
            version = upstream_path(context, train_key, project)
            result = register(spec, project.layout, version)
        return project.recorded(
            context,
            dg.MaterializeResult(
                data_version=dg.DataVersion(result.digest),
                metadata={
                    "entries": dg.MetadataValue.json(result.entries),
                    "path": project.layout.relative(project.layout.dataset_info),
                },
            ),
        )

    return dataset_info
