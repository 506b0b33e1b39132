"""`<recipe>/hub_model`, which is there only where `push_to_hub` is set."""

import dagster as dg

from mllm_assets.components.lineage import upstream_path
from mllm_assets.components.reporting import link, table
from mllm_assets.components.resources import ProjectResource, failures_for_people
from mllm_assets.components.wiring import Node
from mllm_assets.evaluation.hub_push import PushSpec, files_to_push, push, require_current, total_bytes


def hub_model_asset(node: Node, spec: PushSpec) -> dg.AssetsDefinition:
    """The release on the Hub; a dry run says what would be pushed, and asks nobody."""

    @dg.asset(
        key=node.key("hub_model"),
        group_name="release",
        kinds={"huggingface"},
        deps=[node.key("released_model")],
        description=f"{node.name}: the current release {'as it would be pushed' if spec.dry_run else 'pushed'} to "
        f"{spec.repo_id}{f' at {spec.revision}' if spec.revision else ''} on the Hugging Face Hub.",
    )
    def hub_model(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        layout = project.layout
        with failures_for_people():
            release_dir = upstream_path(context, node.key("released_model"), project)
            require_current(layout, node.name, release_dir)
            files = files_to_push(release_dir)
            pushed = {} if spec.dry_run else push(release_dir, spec)
        if spec.dry_run:
            context.log.info(f"Dry run: nothing was sent. push_to_hub.dry_run: false pushes to {spec.repo_id}.")
        columns = {"file": "string", "num_bytes": "int"}
        return project.recorded(
            context,
            dg.MaterializeResult(
                data_version=dg.DataVersion(pushed.get("commit", f"dry run of {release_dir.name}")),
                metadata={
                    "dry_run": spec.dry_run,
                    "repo_id": spec.repo_id,
                    "private": spec.private,
                    "revision": spec.revision or "main",
                    "version": release_dir.name,
                    "files": table([{"file": f.name, "num_bytes": f.num_bytes} for f in files], columns),
                    "num_files": len(files),
                    "size_mib": round(total_bytes(files) / 2**20, 2),
                    **({"commit": pushed["commit"], "commit_url": link(pushed["commit_url"])} if pushed else {}),
                },
            ),
        )

    return hub_model
