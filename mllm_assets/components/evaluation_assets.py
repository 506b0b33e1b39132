"""`<recipe>/predictions`, `<recipe>/eval_metrics` and `<recipe>/released_model`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json, is_complete, read_manifest
from mllm_assets.components.lineage import library_versions, materialize_command, upstream, upstream_path
from mllm_assets.components.reporting import table
from mllm_assets.components.resources import AcceleratorResource, ProjectResource, failures_for_people
from mllm_assets.components.training_assets import model_directory
from mllm_assets.components.wiring import Node
from mllm_assets.data.leaks import release_leaks
from mllm_assets.data.sharegpt import entry_digest, load_rows
from mllm_assets.errors import GateError
from mllm_assets.evaluation.gates import GateResult, GateSpec, evaluate_gates
from mllm_assets.evaluation.intervals import gain_text
from mllm_assets.evaluation.metrics import compute_metrics, gains_over_release, metric_rows, read_metrics, write_metrics
from mllm_assets.evaluation.model_card import DatasetLineage, Lineage
from mllm_assets.evaluation.release import newest_release, publish, read_judged
from mllm_assets.evaluation.table import read_predictions, store_table
from mllm_assets.layout import Layout

GATES = {
    "beats_base_model": "Its loss is lower than that of the model it started from.",
    "beats_most_common_answer": "It answers better than one who always gives the most common training answer.",
    "the_model_uses_the_image": "Its loss is lower with a sample's own image than with another sample's.",
    "no_regression_against_release": "Its loss is not above that of the newest release.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """How predictions are made; see `components.fine_tuning.Evaluation`."""

    max_new_tokens: int
    batch_size: int
    max_samples: int | None


def predictions_asset(node: Node, settings: EvaluationSettings) -> dg.AssetsDefinition:
    """What the base and the tuned model say for each validation sample."""

    @dg.asset(
        key=node.key("predictions"),
        group_name="evaluate",
        kinds={"duckdb"},
        deps=[node.key("checkpoint"), node.model, *sorted(set(node.eval_data.values()))],
        pool="gpu",
        code_version=digest_json(asdict(settings))[:16],
        description="Answers and losses of the base and the tuned model, by sample, in DuckDB, with a gallery.",
    )
    def predictions(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        layout = project.layout
        with failures_for_people():
            request = _evaluation_request(context, node, settings, layout)
        directory = Path(request["directory"])
        if is_complete(directory):
            context.log.info(f"{layout.relative(directory)} holds these predictions already.")
            result = read_manifest(directory)
        else:
            result = gpu.run(context, request)
        with failures_for_people():
            rows = store_table(read_predictions(directory), **_run_columns(context, node, request["weights_digest"]))
            project.quality_store.write({"predictions": rows})
        return project.recorded(
            context,
            dg.MaterializeResult(
                data_version=dg.DataVersion(result["digest"]),
                metadata={
                    "num_samples": sum(result["entries"].values()),
                    "num_predictions": result["num_predictions"],
                    "weights_digest": request["weights_digest"],
                    "gallery": dg.MetadataValue.md((directory / "gallery.md").read_text(encoding="utf-8")),
                    "gallery_path": layout.relative(directory / "gallery.html"),
                    "wall_s": result["wall_s"],
                    "path": layout.relative(directory),
                },
            ),
        )

    return predictions


def eval_metrics_asset(node: Node, gates: GateSpec) -> dg.AssetsDefinition:
    """The tuned model's metrics against the base model's, the most common answer's and the released model's."""
    key = node.key("eval_metrics")

    @dg.asset(
        key=key,
        group_name="evaluate",
        kinds={"json"},
        deps=[node.key("predictions"), *node.data],
        code_version=digest_json(asdict(gates))[:16],
        check_specs=[
            dg.AssetCheckSpec(name, asset=key, blocking=True, description=text) for name, text in GATES.items()
        ],
        description="Loss, perplexity, BLEU, chrF, ROUGE, CIDEr-D and label accuracy, each with its gain over the base "
        "model and the release, and the gates of a release as checks.",
    )
    def eval_metrics(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        layout, spec = project.layout, node.recipe.spec
        with failures_for_people():
            predictions_dir = upstream_path(context, node.key("predictions"), layout)
            rows = read_predictions(predictions_dir)
            answers = _train_answers(layout.root / spec.dataset_dir, spec.train_entries)
            release = newest_release(layout, node.name)
            metrics = compute_metrics(rows, answers)
            metrics |= {
                "release": release.version if release else None,
                "over_release": gains_over_release(rows, read_judged(release)) if release else None,
            }
            predicted = upstream(context, node.key("predictions"))
            inputs = {
                "weights_digest": predicted["weights_digest"],
                "predictions": predicted["data_version"],
                "predictions_path": layout.relative(predictions_dir),
            }
            directory = layout.metrics(node.name, digest_json([__version__, inputs, metrics])[:16])
            manifest = write_metrics(directory, metrics, inputs)
            results = evaluate_gates(metrics, gates, metrics["over_release"])
            scores = metric_rows(metrics, **_run_columns(context, node, predicted["weights_digest"]))
            project.quality_store.write({"eval_metrics": scores})
        return project.recorded(
            context,
            dg.MaterializeResult(
                data_version=dg.DataVersion(manifest["digest"]),
                check_results=_gate_checks(results),
                metadata={**_headline(metrics), "metrics": _metrics_table(metrics), "path": layout.relative(directory)},
            ),
        )

    return eval_metrics


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
        description="A plain Hugging Face directory with a model card; a release never changes.",
    )
    def released_model(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        layout = project.layout
        with failures_for_people():
            run_dir = upstream_path(context, node.key("checkpoint"), layout)
            metrics_dir = upstream_path(context, node.key("eval_metrics"), layout)
            inputs = read_manifest(metrics_dir)["inputs"]

            def verify(directory: Path) -> Mapping[str, Any]:
                model = run_dir / "model"
                return gpu.run(context, {"task": "release", "directory": str(directory), "checkpoint_dir": str(model)})

            leaks = _leaks(context, node, project, read_manifest(run_dir), allow_leakage=allow_leakage)
            lineage: Lineage = {**_lineage(context, node, read_manifest(run_dir)), "leaks": leaks}
            release = publish(
                node.name,
                run_dir,
                read_metrics(metrics_dir),
                read_predictions(layout.root / inputs["predictions_path"]),
                gates,
                lineage,
                layout,
                scored_weights=inputs["weights_digest"],
                verify=verify,
            )
        return project.recorded(
            context,
            dg.MaterializeResult(
                data_version=dg.DataVersion(release.digest),
                metadata={
                    "version": release.version,
                    "leaks": leaks,
                    "model_card": dg.MetadataValue.md((release.directory / "README.md").read_text(encoding="utf-8")),
                    "path": layout.relative(release.directory),
                },
            ),
        )

    return released_model


def _leaks(
    context: dg.AssetExecutionContext,
    node: Node,
    project: ProjectResource,
    run: Mapping[str, Any],
    *,
    allow_leakage: bool,
) -> list[str]:
    """What leaked from the evaluation into the training, looked for in the files on disk; empty is well.

    Raises:
        GateError: Something did, and is not allowed.
    """
    spec = node.recipe.spec
    found = release_leaks(
        project.layout.root / spec.dataset_dir,
        spec.train_entries,
        spec.eval_entries,
        run["data_digests"],
        store=project.quality_store,
    )
    if found and not allow_leakage:
        raise GateError(
            f"{node.name} is not released: {' '.join(found)} Mend the data, or set `allow_leakage: true` in the "
            "recipe's settings; the model card will then say so."
        )
    for text in found:
        context.log.warning(text)
    return found


def _evaluation_request(
    context: dg.AssetExecutionContext, node: Node, settings: EvaluationSettings, layout: Layout
) -> dict[str, Any]:
    """What to ask of the worker; the directory is named by all that the answers depend on."""
    spec = node.recipe.spec
    data_dir = layout.root / spec.dataset_dir
    tuned = upstream(context, node.key("checkpoint"))
    names = ("cutoff_len", "image_max_pixels", "template", "enable_thinking")
    how = {**{name: getattr(spec, name) for name in names}, **asdict(settings)}
    identity = {
        "engine_version": __version__,
        "tuned": tuned["data_version"],
        "base": upstream(context, node.model)["data_version"],
        "data": {entry: entry_digest(data_dir, entry) for entry in spec.eval_entries},
        **how,
    }
    return {
        "task": "evaluate",
        "recipe_name": node.name,
        "weights_digest": tuned["data_version"],
        "model_dir": str(layout.root / tuned["model_path"]),
        "base_model_dir": str(model_directory(context, node, layout)),
        "data_dir": str(data_dir),
        "entries": list(spec.eval_entries),
        "directory": str(layout.predictions(node.name, digest_json(identity)[:16])),
        **how,
    }


def _run_columns(context: dg.AssetExecutionContext, node: Node, weights_digest: str) -> dict[str, str]:
    return {"run_id": context.run.run_id, "recipe": node.name, "checkpoint_digest": weights_digest}


def _train_answers(data_dir: Path, entries: Sequence[str]) -> list[str]:
    return [row.messages[-1].content for entry in entries for row in load_rows(data_dir, entry)]


def _gate_checks(results: Sequence[GateResult]) -> list[dg.AssetCheckResult]:
    judged = {result.name: result for result in results}
    none_yet = "Nothing of this recipe is released yet."
    checks = []
    for name in GATES:
        result = judged.get(name)
        passed, text = (result.passed, result.description) if result else (True, none_yet)
        figures = {"observed": result.observed, "threshold": result.threshold} if result else {}
        figures = {figure: value for figure, value in figures.items() if value is not None}
        checks.append(dg.AssetCheckResult(check_name=name, passed=passed, description=text, metadata=figures))
    return checks


def _headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The tuned model's numbers as metadata of their own, so that Dagster plots them over time."""
    entries = metrics["entries"]
    return {
        f"{metric}_{entry}" if len(entries) > 1 else metric: value
        for entry, scored in entries.items()
        for metric, value in scored["models"]["tuned"].items()
    }


def _metrics_table(metrics: Mapping[str, Any]) -> dg.TableMetadataValue:
    over_release = metrics["over_release"] or {}
    rows = [
        {
            "entry": entry,
            "metric": metric,
            "base": scored["models"]["base"].get(metric),
            "tuned": value,
            "gain_over_base": gain_text(scored["gains"]["tuned_over_base"].get(metric)),
            "gain_over_release": gain_text(over_release.get(entry, {}).get(metric)),
        }
        for entry, scored in metrics["entries"].items()
        for metric, value in scored["models"]["tuned"].items()
    ]
    columns = {"entry": "string", "metric": "string", "base": "float", "tuned": "float"}
    return table(rows, columns | {"gain_over_base": "string", "gain_over_release": "string"})


def _lineage(context: dg.AssetExecutionContext, node: Node, run: Mapping[str, Any]) -> Lineage:
    """What the model was made from, for its card."""
    spec, base = node.recipe.spec, upstream(context, node.model)
    uses = {"train": node.train_data, "evaluate": node.eval_data}
    return {
        "base_model": {
            "name": spec.model_name_or_path,
            "fingerprint": base["data_version"] or "",
            "hub_id": base.get("hub_id") or None,
            "revision": base.get("revision") or None,
            "license": base.get("license") or None,
        },
        "datasets": [
            _dataset_lineage(context, entry, use, key, run["data_digests"].get(entry, ""))
            for use, data in uses.items()
            for entry, key in data.items()
        ],
        "recipe": dict(node.recipe.values),
        "versions": library_versions(),
        "command": materialize_command(node.key("released_model")),
    }


def _dataset_lineage(
    context: dg.AssetExecutionContext, entry: str, use: str, dataset_info: dg.AssetKey, digest: str
) -> DatasetLineage:
    """What trained or judged the model, and where it came from; entries written by hand say no more than their name."""
    raw = dg.AssetKey([dataset_info.path[0], "raw"])
    known = context.instance.get_latest_materialization_event(raw) is not None
    facts = upstream(context, raw) if known else {}
    return {
        "entry": entry,
        "use": use,
        "digest": digest,
        "hub_id": facts.get("hub_id") or None,
        "revision": facts.get("revision") or None,
        "license": facts.get("license") or None,
    }
