"""`<recipe>/released_model`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets.artifacts import read_manifest
from mllm_assets.components.gate_checks import find_leaks
from mllm_assets.components.lineage import bring_data, library_versions, upstream, upstream_path
from mllm_assets.components.reporting import table
from mllm_assets.components.resources import AcceleratorResource, ProjectResource, failures_for_people
from mllm_assets.components.starting_model import model_directory, recorded_origin
from mllm_assets.components.wiring import Node
from mllm_assets.data.leaks import require_sound_versions
from mllm_assets.data.sharegpt import load_rows
from mllm_assets.evaluation.gates import GateSpec
from mllm_assets.evaluation.judgement import read_judgement
from mllm_assets.evaluation.model_card import DatasetLineage, Lineage
from mllm_assets.evaluation.release import publish
from mllm_assets.evaluation.release_versions import current_release
from mllm_assets.layout import Layout
from mllm_assets.project.read import materialize_command


def released_model_asset(node: Node, gates: GateSpec, *, allow_leakage: bool = False) -> dg.AssetsDefinition:
    """The model that passed its gates, which are judged here once more, and whose data is looked at once more.

    Args:
        node: The recipe in the graph.
        gates: Must hold.
        allow_leakage: Release, and say so in the card, where it may have been trained on what it is evaluated on.
    """

    @dg.asset(
        key=node.key("released_model"),
        group_name="release",
        kinds={"pytorch"},
        deps=[node.key("eval_metrics"), node.key("checkpoint")],
        pool="gpu",
        description=f"{node.name}: a plain Hugging Face directory with a model card; a release never changes.",
    )
    def released_model(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        layout = project.layout
        with failures_for_people():
            if mirror := project.mirror(context):
                mirror.follow_current(node.name, all_versions=True)  # the next version's number comes after all
            bring_data(context, [*node.data, *node.earlier_data], project)
            run_dir = upstream_path(context, node.key("checkpoint"), project)
            metrics_dir = upstream_path(context, node.key("eval_metrics"), project)
            judgement = read_judgement(metrics_dir, layout)
            base_model_dir = model_directory(context, node, project)

            def verify(directory: Path) -> Mapping[str, Any]:
                request = {
                    "task": "release",
                    "directory": str(directory),
                    "checkpoint_dir": str(run_dir / "model"),
                    "base_model_dir": str(base_model_dir),
                }
                return gpu.run(context, request)

            spec = node.recipe.spec
            require_sound_versions(layout.root / spec.dataset_dir, [*spec.train_entries, *spec.eval_entries])
            leaks = find_leaks(context, node, project, judgement.data_digests)
            for text in leaks:
                context.log.warning(text)
            lineage = _lineage(context, node, layout, read_manifest(run_dir), leaks)
            release = publish(
                node.name,
                run_dir,
                judgement.metrics,
                judgement.predictions,
                gates,
                lineage,
                layout,
                scored_weights=judgement.weights_digest,
                allow_leakage=allow_leakage,
                verify=verify,
            )
            current = current_release(layout, node.name)
            if current != release:
                context.log.warning(
                    f"{release.version} holds this model already, and was rolled back. It is the current release "
                    f"again after: mllm-assets releases rollback {node.name} {release.version}"
                )
        return project.recorded(
            context,
            dg.MaterializeResult(
                data_version=dg.DataVersion(release.digest),
                metadata={
                    "version": release.version,
                    "current": current.version if current else "",
                    "model_card": dg.MetadataValue.md((release.directory / "README.md").read_text(encoding="utf-8")),
                    "path": layout.relative(release.directory),
                    "leaks": leaks,
                    "gates": _gates_table(read_manifest(release.directory)["gates"]),
                },
            ),
        )

    return released_model


def _gates_table(gates: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    columns = {"name": "string", "passed": "bool", "description": "string"}
    return table(gates, columns)


def _lineage(
    context: dg.AssetExecutionContext, node: Node, layout: Layout, run: Mapping[str, Any], leaks: Sequence[str]
) -> Lineage:
    """What the model was made from, for its card."""
    spec = node.recipe.spec
    uses = {"train": node.train_data, "evaluate": node.eval_data}
    return {
        **recorded_origin(context, node),
        "datasets": [
            _dataset(context, entry, use, key, run["data_digests"].get(entry, ""), layout.root / spec.dataset_dir)
            for use, data in uses.items()
            for entry, key in data.items()
        ],
        "recipe": dict(node.recipe.values),
        "versions": library_versions(),
        "command": materialize_command(f"{node.name}/released_model"),
        "leaks": leaks,
    }


def _dataset(
    context: dg.AssetExecutionContext, entry: str, use: str, dataset_info: dg.AssetKey, digest: str, data_dir: Path
) -> DatasetLineage:
    """What trained or judged the model, and where it came from; entries written by hand say no more than their name."""
    raw = dg.AssetKey([dataset_info.path[0], "raw"])
    known = context.instance.get_latest_materialization_event(raw) is not None
    facts = upstream(context, raw) if known else {}
    return {
        "entry": entry,
        "use": use,
        "digest": digest,
        "num_rows": len(load_rows(data_dir, entry)),
        "source": f"the dataset {raw.path[0]}" if known else None,
        "hub_id": facts.get("hub_id") or None,
        "revision": facts.get("revision") or None,
        "license": facts.get("license") or None,
    }
