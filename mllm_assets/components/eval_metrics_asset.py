"""`<recipe>/eval_metrics` and the gates of a release as its checks."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import dagster as dg

from mllm_assets.artifacts import digest_json
from mllm_assets.components.gate_checks import OF_METRICS, find_leaks, gate_checks, gate_specs
from mllm_assets.components.lineage import bring_data, run_columns, upstream, upstream_path
from mllm_assets.components.reporting import shown, table
from mllm_assets.components.resources import ProjectResource, failures_for_people
from mllm_assets.components.wiring import Node
from mllm_assets.evaluation.gates import GateSpec, evaluate_gates, leakage_gate
from mllm_assets.evaluation.intervals import gain_text
from mllm_assets.evaluation.scoring import score_predictions

MAX_CONFUSION_LABELS = 20  # a table with more columns cannot be read
MAX_MISTAKES = 100
LOOKED_AT_FIRST = ("label_accuracy", "loss", "loss_shuffled", "perplexity")


def eval_metrics_asset(node: Node, gates: GateSpec, *, allow_leakage: bool = False) -> dg.AssetsDefinition:
    """The tuned model's metrics against the base model's, the most common answer's and the released model's.

    Args:
        node: The recipe in the graph.
        gates: The checks' thresholds.
        allow_leakage: Let `no_leakage` warn only.
    """
    key = node.key("eval_metrics")

    @dg.asset(
        key=key,
        group_name="evaluate",
        kinds={"json"},
        deps=[node.key("predictions"), node.key("checkpoint"), *node.data],
        code_version=digest_json(asdict(gates))[:16],
        check_specs=gate_specs(key, OF_METRICS),
        description=f"{node.name}: loss, perplexity, BLEU, chrF, ROUGE, CIDEr-D and label accuracy, each with its gain "
        "over the base model and the release, and the gates of a release as checks.",
    )
    def eval_metrics(context: dg.AssetExecutionContext, project: ProjectResource) -> dg.MaterializeResult:
        with failures_for_people():
            bring_data(context, [*node.data, *node.earlier_data], project)
            predictions_dir = upstream_path(context, node.key("predictions"), project)
            if mirror := project.mirror(context):
                mirror.follow_current(node.name)
            predicted = upstream(context, node.key("predictions"))
            scored = score_predictions(project.layout, node.name, node.recipe.spec, predictions_dir, predicted)
            columns = run_columns(context, node.name, predicted["weights_digest"])
            project.quality_store.write({"eval_metrics": scored.rows(**columns)})
            leaks = find_leaks(context, node, project, predicted["data_digests"])
        metrics = scored.metrics
        results = [leakage_gate(leaks, allowed=allow_leakage), *evaluate_gates(metrics, gates, metrics["over_release"])]
        return project.recorded(
            context,
            dg.MaterializeResult(
                data_version=dg.DataVersion(scored.digest),
                check_results=gate_checks(results, OF_METRICS),
                metadata={
                    **_headline(metrics),
                    "num_samples": scored.num_samples,
                    "path": project.layout.relative(scored.directory),
                    "metrics": _metrics_table(metrics),
                    **_confusion_tables(metrics),
                    "definitions": dg.MetadataValue.json(metrics["definitions"]),
                },
            ),
        )

    return eval_metrics


def _headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The tuned model's numbers as metadata of their own, so that Dagster plots them over time."""
    entries = metrics["entries"]
    return {
        f"{metric}_{entry}" if len(entries) > 1 else metric: shown(value)
        for entry, scored in entries.items()
        for metric, value in sorted(scored["models"]["tuned"].items(), key=lambda item: item[0] not in LOOKED_AT_FIRST)
    }


def _confusion_tables(metrics: Mapping[str, Any]) -> dict[str, dg.TableMetadataValue]:
    """What the tuned model named for each label: a column a label, or of many labels the most frequent mistakes."""
    tables = {}
    for entry, scored in metrics["entries"].items():
        if "confusion" not in scored:
            continue
        confusion = scored["confusion"]["tuned"]
        labels, named = confusion["labels"], confusion["named"]
        if len(labels) <= MAX_CONFUSION_LABELS:
            rows = [
                {"label": label, **{f"as {name}": count for name, count in zip(named, counts, strict=True)}}
                for label, counts in zip(labels, confusion["counts"], strict=True)
            ]
            columns = {"label": "string", **{f"as {name}": "int" for name in named}}
        else:
            mistakes = [
                {"label": label, "named": name, "count": count}
                for label, counts in zip(labels, confusion["counts"], strict=True)
                for name, count in zip(named, counts, strict=True)
                if count and name != label
            ]
            rows = sorted(mistakes, key=lambda row: -row["count"])[:MAX_MISTAKES]
            columns = {"label": "string", "named": "string", "count": "int"}
        tables[f"confusion_{entry}" if len(metrics["entries"]) > 1 else "confusion"] = table(rows, columns)
    return tables


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
