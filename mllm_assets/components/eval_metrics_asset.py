"""`<recipe>/eval_metrics` and the gates of a release as its checks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json
from mllm_assets.components.gate_checks import OF_METRICS, find_leaks, gate_checks, gate_specs
from mllm_assets.components.lineage import bring_data, run_columns, upstream, upstream_path
from mllm_assets.components.reporting import shown, table
from mllm_assets.components.resources import ProjectResource, failures_for_people
from mllm_assets.components.wiring import Node
from mllm_assets.data.sharegpt import load_rows
from mllm_assets.evaluation.gates import GateSpec, evaluate_gates, leakage_gate
from mllm_assets.evaluation.intervals import gain_text
from mllm_assets.evaluation.metrics import compute_metrics
from mllm_assets.evaluation.metrics_file import metric_rows, write_metrics
from mllm_assets.evaluation.over_release import gains_over_release
from mllm_assets.evaluation.release import read_judged
from mllm_assets.evaluation.release_versions import current_release
from mllm_assets.evaluation.table import read_predictions

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
        layout, spec = project.layout, node.recipe.spec
        with failures_for_people():
            bring_data(context, [*node.data, *node.earlier_data], project)
            predictions_dir = upstream_path(context, node.key("predictions"), project)
            rows = read_predictions(predictions_dir)
            answers = _train_answers(layout.root / spec.dataset_dir, spec.train_entries)
            if mirror := project.mirror(context):
                mirror.follow_current(node.name)
            release = current_release(layout, node.name)
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
                "data_digests": predicted["data_digests"],
            }
            directory = layout.metrics(node.name, digest_json([__version__, inputs, metrics])[:16])
            manifest = write_metrics(directory, metrics, inputs)
            leakage = leakage_gate(find_leaks(context, node, project, inputs["data_digests"]), allowed=allow_leakage)
            results = [leakage, *evaluate_gates(metrics, gates, metrics["over_release"])]
            scores = metric_rows(metrics, **run_columns(context, node.name, predicted["weights_digest"]))
            project.quality_store.write({"eval_metrics": scores})
        return project.recorded(
            context,
            dg.MaterializeResult(
                data_version=dg.DataVersion(manifest["digest"]),
                check_results=gate_checks(results, OF_METRICS),
                metadata={
                    **_headline(metrics),
                    "num_samples": sum(scored["num_samples"] for scored in metrics["entries"].values()),
                    "path": layout.relative(directory),
                    "metrics": _metrics_table(metrics),
                    **_confusion_tables(metrics),
                    "definitions": dg.MetadataValue.json(metrics["definitions"]),
                },
            ),
        )

    return eval_metrics


def _train_answers(data_dir: Path, entries: Sequence[str]) -> list[str]:
    return [row.messages[-1].content for entry in entries for row in load_rows(data_dir, entry)]


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
