"""`<recipe>/predictions`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json, is_complete, read_manifest
from mllm_assets.components.lineage import bring_data, run_columns, upstream, upstream_path
from mllm_assets.components.resources import AcceleratorResource, ProjectResource, failures_for_people
from mllm_assets.components.starting_model import model_directory
from mllm_assets.components.wiring import Node
from mllm_assets.data.sharegpt import entry_digest
from mllm_assets.evaluation.metrics import sample_metrics
from mllm_assets.evaluation.table import read_predictions, store_table


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """How predictions are made; see `components.fine_tuning.Evaluation`."""

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_p: float
    seed: int
    batch_size: int
    max_samples: int | None


def predictions_asset(node: Node, settings: EvaluationSettings, *, feature_cache: bool = True) -> dg.AssetsDefinition:
    """What the base and the tuned model say for each validation sample.

    Args:
        node: The recipe in the graph.
        settings: How they are asked.
        feature_cache: Whether they may answer from the frozen vision tower's cached output.
    """

    @dg.asset(
        key=node.key("predictions"),
        group_name="evaluate",
        kinds={"duckdb"},
        deps=[node.key("checkpoint"), node.model, *sorted(set(node.eval_data.values()))],
        pool="gpu",
        code_version=digest_json(asdict(settings))[:16],
        description=f"{node.name}: answers and losses of the base and the tuned model, by sample, in DuckDB, with a "
        "gallery.",
    )
    def predictions(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        layout = project.layout
        with failures_for_people():
            bring_data(context, sorted(set(node.eval_data.values())), project)
            request = _evaluation_request(context, node, settings, project, feature_cache=feature_cache)
            directory = Path(request["directory"])
            if (mirror := project.mirror(context)) and not mirror.bring(directory):
                upstream_path(context, node.key("checkpoint"), project)
        if is_complete(directory):
            context.log.info(f"{layout.relative(directory)} holds these predictions already.")
            result = read_manifest(directory)
        else:
            result = gpu.run(context, request)
        with failures_for_people():
            said = read_predictions(directory)
            columns = run_columns(context, node.name, request["weights_digest"])
            rows = store_table(said, sample_metrics(said), **columns)
            project.quality_store.write({"predictions": rows})
        return project.recorded(
            context,
            dg.MaterializeResult(
                data_version=dg.DataVersion(result["digest"]),
                metadata={
                    "gallery": dg.MetadataValue.md((directory / "gallery.md").read_text(encoding="utf-8")),
                    "gallery_path": layout.relative(directory / "gallery.html"),
                    "num_samples": sum(result["entries"].values()),
                    "num_predictions": result["num_predictions"],
                    "wall_s": result["wall_s"],
                    "path": layout.relative(directory),
                    "weights_digest": request["weights_digest"],
                    "data_digests": dg.MetadataValue.json(request["data_digests"]),
                },
            ),
        )

    return predictions


def _evaluation_request(
    context: dg.AssetExecutionContext,
    node: Node,
    settings: EvaluationSettings,
    project: ProjectResource,
    *,
    feature_cache: bool,
) -> dict[str, Any]:
    """What to ask of the worker; the directory is named by all that the answers depend on."""
    spec, layout = node.recipe.spec, project.layout
    data_dir = layout.root / spec.dataset_dir
    tuned = upstream(context, node.key("checkpoint"))
    names = ("cutoff_len", "image_max_pixels", "image_min_pixels", "template", "enable_thinking")
    how = {**{name: getattr(spec, name) for name in names}, **asdict(settings)}
    data_digests = {entry: entry_digest(data_dir, entry) for entry in spec.eval_entries}
    identity = {
        "engine_version": __version__,
        "tuned": tuned["data_version"],
        "base": upstream(context, node.model)["data_version"],
        "data": data_digests,
        **how,
    }
    return {
        "task": "evaluate",
        "recipe_name": node.name,
        "weights_digest": tuned["data_version"],
        "model_dir": str(layout.root / tuned["model_path"]),
        "base_model_dir": str(model_directory(context, node, project)),
        "data_dir": str(data_dir),
        "data_digests": data_digests,
        "entries": list(spec.eval_entries),
        "recipe": spec.to_dict(),
        "features_root": str(layout.features) if feature_cache and spec.freeze_vision_tower else None,
        "directory": str(layout.predictions(node.name, digest_json(identity)[:16])),
        **how,
    }
