"""Which runs of a recipe were evaluated, and what by: a plain `mllm-assets train` makes a newest run that was not."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.artifacts import is_complete, read_manifest
from mllm_assets.layout import Layout
from mllm_assets.project.read import materialize_command


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedRun:
    """A run, the metrics of its weights, and the predictions that they were made of."""

    run_dir: Path
    metrics_dir: Path
    predictions_dir: Path


def evaluated_runs(layout: Layout, recipe: str) -> Iterator[EvaluatedRun]:
    """The runs of a recipe that were evaluated, the last evaluation first."""
    parent = layout.outputs / recipe
    runs = {read_manifest(path).get("weights_digest"): path for path in parent.glob("*") if _is_run(path)}
    found = sorted(parent.glob("eval_metrics/*/manifest.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for manifest in found:
        inputs = read_manifest(manifest.parent)["inputs"]
        if run_dir := runs.get(inputs.get("weights_digest")):
            predictions_dir = layout.root / inputs.get("predictions_path", "")
            yield EvaluatedRun(run_dir=run_dir, metrics_dir=manifest.parent, predictions_dir=predictions_dir)


def how_to_evaluate(layout: Layout, run_dir: Path) -> str:
    """What to do for a run's metrics."""
    recipe = run_dir.parent.name
    return (
        f"To evaluate {layout.relative(run_dir)}: {materialize_command(f'{recipe}/eval_metrics')} (it takes this run "
        "where the recipe's file says the same, and trains otherwise)."
    )


def evaluation_of(layout: Layout, run_dir: Path) -> EvaluatedRun | None:
    """The last evaluation of a run's weights."""
    weights = read_manifest(run_dir)["weights_digest"]
    runs = evaluated_runs(layout, run_dir.parent.name)
    return next((run for run in runs if read_manifest(run.run_dir)["weights_digest"] == weights), None)


def _is_run(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and is_complete(path)
