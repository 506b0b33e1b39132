"""`<recipe>/eval_metrics` and the gates of a release as its checks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json
from mllm_assets.components.lineage import run_columns, upstream, upstream_path
from mllm_assets.components.reporting import table
from mllm_assets.components.resources import ProjectResource, failures_for_people
from mllm_assets.components.wiring import Node
from mllm_assets.data.sharegpt import load_rows
from mllm_assets.evaluation.gates import GateResult, GateSpec, evaluate_gates
from mllm_assets.evaluation.intervals import gain_text
from mllm_assets.evaluation.metrics import compute_metrics, gains_over_release, metric_rows, write_metrics
from mllm_assets.evaluation.release import newest_release, read_judged
from mllm_assets.evaluation.table import read_predictions

GATES = {
    "beats_base_model": "Its loss is lower than that of the model it started from.",
    "beats_most_common_answer": "It answers better than one who always gives the most common training answer.",
    "the_model_uses_the_image": "Its loss is lower with a sample's own image than with another sample's.",
    "no_regression_against_release": "Its loss is not above that of the newest release.",
}


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
            scores = metric_rows(metrics, **run_columns(context, node.name, predicted["weights_digest"]))
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
