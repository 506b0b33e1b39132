"""`<recipe>/mlflow_model`: the current release as a version of a registered model of MLflow."""

from pathlib import Path

import dagster as dg

from mllm_assets.components.assets.step import step
from mllm_assets.components.reporting import link
from mllm_assets.components.resources import ProjectResource
from mllm_assets.components.wiring import Node
from mllm_assets.releases.registry import Registry, RegistrySpec
from mllm_assets.releases.versions import find_release


def mlflow_model_asset(node: Node, spec: RegistrySpec) -> dg.AssetsDefinition:
    """The release in MLflow's registry, under the alias."""

    @dg.asset(
        key=node.key("mlflow_model"),
        group_name="release",
        kinds={"mlflow"},
        deps=[node.key("released_model")],
        description=f"{node.name}: the current release as a version of {spec.registered_model or node.name} in "
        f"MLflow's registry, with the alias {spec.alias}.",
    )
    @step
    def mlflow_model(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        layout = project.layout
        if mirror := project.mirror(context):
            mirror.follow_current(node.name)
        release = find_release(layout, node.name)  # after a rollback not the one that was made last
        registered = Registry(layout, node.name, spec).register(release)
        is_page = registered.page.startswith(("http://", "https://"))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(f"{registered.uri} of {release.digest}"),
            metadata={
                "version": release.version,
                "registered_as": registered.uri,
                "alias": spec.alias,
                "mlflow_run": registered.run_id,
                "registry": link(registered.page) if is_page else layout.relative(Path(registered.page)),
            },
        )

    return mlflow_model
