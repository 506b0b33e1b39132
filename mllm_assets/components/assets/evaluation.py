"""`<recipe>/predictions` and `<recipe>/eval_metrics`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json, is_sound, read_manifest
from mllm_assets.components.assets.lineage import (
    as_trained,
    find_leaks,
    model_directory,
    pull_data,
    run_columns,
    upstream,
    upstream_path,
)
from mllm_assets.components.assets.step import step
from mllm_assets.components.reporting import (
    gate_checks,
    gate_specs,
    in_window,
    link,
    metric_gates,
    png_markdown,
    rounded,
    with_page,
)
from mllm_assets.components.resources import AcceleratorResource, ProjectResource
from mllm_assets.components.wiring import Node
from mllm_assets.data.curate.register import judging_entries
from mllm_assets.data.sharegpt.dataset import Dataset, media_dir_of
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.benchmarks import read_benchmarks
from mllm_assets.evaluation.forgetting import forgetting_markdown, measure_forgetting, unrelated_entries
from mllm_assets.evaluation.gallery import GALLERY
from mllm_assets.evaluation.gates import APPROVAL, evaluate_gates, leakage_gate
from mllm_assets.evaluation.metric_page import (
    confusion_png,
    gates_markdown,
    metrics_markdown,
    mistakes_markdown,
    release_gains_markdown,
)
from mllm_assets.evaluation.metrics import ReleasedPredictions, metric_rows, sample_metrics, score_predictions
from mllm_assets.evaluation.table import read_predictions, store_table
from mllm_assets.file_digests import remember
from mllm_assets.project.read import materialize_command
from mllm_assets.releases.approvals import Subject, approval_gate, read_decisions
from mllm_assets.releases.versions import judged_release, version_folders
from mllm_assets.worker.tasks import EvaluateTask, EvaluationSettings


def predictions_asset(node: Node) -> dg.AssetsDefinition:
    """The answers of the base and the tuned model to each sample of the test split, or of what judges instead."""
    settings: EvaluationSettings = node.settings.evaluation.to_spec()
    asked = sorted({*node.eval_data.values(), *node.unrelated_data.values()})

    @dg.asset(
        key=node.key("predictions"),
        group_name="evaluate",
        kinds={"duckdb"},
        deps=[node.key("checkpoint"), node.model, *asked],
        pool="gpu",
        code_version=digest_json(settings.identity())[:16],
        description=f"{node.name}: answers and losses of the base and the tuned model, by sample, in DuckDB, with a "
        "gallery.",
    )
    @step
    def predictions(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        layout = project.layout
        pull_data(context, asked, project)
        spec = as_trained(context, node)
        dataset = Dataset.of_recipe(spec, layout.root, read_part=None)
        digests = {name: dataset.entry(name).digest for name in judging_entries(dataset, spec.eval_entries)}
        if also_chose := sorted(set(digests) & set(spec.eval_entries)):
            context.log.warning(
                f"{', '.join(also_chose)} judges {node.name}, although eval_dataset names it, so that it may have "
                "chosen checkpoints and settings: the figures may be too good. A dataset's test split judges instead "
                "where there is one: `num_test:` below `split:` in the dataset's defs.yaml makes one."
            )
        weights_digest = upstream(context, node.key("checkpoint"))["data_version"]
        task = _evaluate_task(context, node, settings, project, digests)
        directory = task.directory
        if (mirror := project.mirror(context)) and not mirror.pull(directory):
            upstream_path(context, node.key("checkpoint"), project)
        if is_sound(directory):
            context.log.info(f"{layout.relative(directory)} already holds these predictions.")
        else:
            remember(gpu.run(context, task).model_files)
        result = read_manifest(directory)
        answers, page = read_predictions(directory), directory / GALLERY
        rows = store_table(answers, sample_metrics(answers), **run_columns(context, node.name, weights_digest))
        project.quality_store.write({"predictions": rows})
        return dg.MaterializeResult(
            data_version=dg.DataVersion(result["digest"]),
            metadata={
                "gallery": with_page(page, page.with_suffix(".md").read_text(encoding="utf-8"), layout),
                "gallery_path": link(str(page)),
                "num_samples": sum(result["entries"].values()),
                "num_predictions": result["num_predictions"],
                "wall_s": result["wall_s"],
                "answered_by": "; ".join(result.get("answered_by", {}).values()),
                "path": layout.relative(directory),
                "weights_digest": weights_digest,
                "data_digests": dg.MetadataValue.json(digests),
            },
        )

    return predictions


def _evaluate_task(
    context: dg.AssetExecutionContext,
    node: Node,
    settings: EvaluationSettings,
    project: ProjectResource,
    data_digests: dict[str, str],
) -> EvaluateTask:
    """The worker's task; its directory is named by everything that the answers depend on."""
    spec, layout = as_trained(context, node), project.layout
    tuned = upstream(context, node.key("checkpoint"))
    models = {"tuned": tuned["data_version"], "base": upstream(context, node.model)["data_version"]}
    dataset = Dataset.of_recipe(spec, layout.root, read_part=None)
    unrelated = unrelated_entries(dataset, settings.unrelated, spec.train_entries)
    unrelated_digests = {name: entry.digest for name, entry in unrelated.items()}
    identity = {
        "engine_version": __version__,
        **models,
        "data": data_digests | unrelated_digests,
        **settings.conditions(spec),
    }
    return EvaluateTask(
        recipe=spec,
        recipe_name=node.name,
        entries=tuple(data_digests),
        model_dir=layout.root / tuned["model_path"],
        base_model_dir=model_directory(context, node, project),
        data_dir=layout.root / spec.dataset_dir,
        media_dir=media_dir_of(spec, layout.root),
        data_digests=data_digests,
        unrelated_digests=unrelated_digests,
        model_digests=models,
        directory=layout.predictions(node.name, digest_json(identity)[:16]),
        settings=settings,
        features_root=layout.features if node.has_features else None,
        rows_root=layout.rows,
    )


def eval_metrics_asset(node: Node) -> dg.AssetsDefinition:
    """The tuned model's metrics against the base model's, the most common answer's and the released model's."""
    gates = node.gates
    key = node.key("eval_metrics")
    judged = metric_gates(gates)

    @dg.asset(
        key=key,
        group_name="evaluate",
        kinds={"json"},
        deps=[node.key("predictions"), node.key("checkpoint"), *node.judged_by_benchmarks, *node.data],
        code_version=digest_json(asdict(gates))[:16],
        check_specs=gate_specs(key, judged),
        description=f"{node.name}: loss, perplexity, BLEU, chrF, ROUGE, CIDEr-D and label accuracy, each with its gain "
        "over the base model and the release, and the gates of a release as checks.",
    )
    @step
    def eval_metrics(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        pull_data(context, [*node.data, *node.ancestor_data], project)
        predictions_dir = upstream_path(context, node.key("predictions"), project)
        if mirror := project.mirror(context):
            mirror.follow_current(node.name)
        predicted = upstream(context, node.key("predictions"))
        released = judged_release(project.layout, node.name)
        if released is None and version_folders(project.layout, node.name):
            context.log.warning(f"Every release of {node.name} is damaged, so the model is compared with none.")
        spec = as_trained(context, node)
        dataset = Dataset.of_recipe(spec, project.layout.root)
        scored = score_predictions(
            project.layout,
            node.name,
            [text for name in spec.train_entries for text in dataset.entry(name).answers],
            predictions_dir,
            predicted,
            released=ReleasedPredictions(version=released[0].version, rows=released[1]) if released else None,
            measured=_measured(context, node, project, predictions_dir),
        )
        columns = run_columns(context, node.name, predicted["weights_digest"])
        project.quality_store.write({"eval_metrics": metric_rows(scored.metrics, **columns)})
        leaks = find_leaks(context, node, project, dataset, predicted["data_digests"])
        metrics = scored.metrics
        results = [leakage_gate(leaks, allowed=node.settings.allow_leakage)]
        results += evaluate_gates(metrics, gates, metrics["over_release"])
        if APPROVAL in judged:
            decisions = read_decisions(project.layout, node.name)
            results.append(approval_gate(node.name, decisions, Subject.of(scored.directory)))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(scored.digest),
            check_results=gate_checks(results, judged),
            metadata={
                **_tables(metrics),
                "gates": in_window(gates_markdown([asdict(result) for result in results])),
                **_headline(metrics),
                "num_samples": scored.num_samples,
                "path": project.layout.relative(scored.directory),
                "definitions": dg.MetadataValue.json(metrics["definitions"]),
            },
        )

    return eval_metrics


def _measured(
    context: dg.AssetExecutionContext, node: Node, project: ProjectResource, predictions_dir: Path
) -> dict[str, dict[str, Any]]:
    """What else says how good the model is; what its benchmarks say where a gate looks at them."""
    found = {"forgetting": measure_forgetting(predictions_dir)}
    for key in node.judged_by_benchmarks:
        if upstream(context, key)["weights_digest"] != upstream(context, node.key("predictions"))["weights_digest"]:
            again = materialize_command(key.to_user_string())
            raise IntegrityError(f"{node.name} was trained again since it was asked benchmarks. Run: {again}")
        found["benchmarks"] = read_benchmarks(upstream_path(context, key, project))
    return found


def _headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The tuned model's metrics as separate metadata, so that Dagster plots them over time."""
    entries = metrics["entries"]
    return {
        f"{metric}_{entry}" if len(entries) > 1 else metric: rounded(value)
        for entry, scored in entries.items()
        for metric, value in scored["models"]["tuned"].items()
    }


def _tables(metrics: Mapping[str, Any]) -> dict[str, dg.MetadataValue]:
    """Each entry's tables and the picture of its confusion matrix, with its name in the key where there are several."""
    found: dict[str, dg.MetadataValue] = {}
    for entry, scored in metrics["entries"].items():
        of_entry = f"_{entry}" if len(metrics["entries"]) > 1 else ""
        found[f"metrics{of_entry}"] = in_window(metrics_markdown(scored))
        if gains := (metrics["over_release"] or {}).get(entry):
            found[f"gains_over_release{of_entry}"] = in_window(release_gains_markdown(gains))
        if "confusion" in scored:
            confusion = scored["confusion"]["tuned"]
            png = confusion_png(confusion)
            picture = f"{png_markdown('confusion', png)}\n\n" if png else ""
            found[f"confusion{of_entry}"] = in_window(picture + mistakes_markdown(confusion))
    if forgetting := metrics.get("forgetting"):
        found["forgetting"] = in_window(forgetting_markdown(forgetting))
    return found
