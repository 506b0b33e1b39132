"""Which runs of a recipe were evaluated, and what by: a plain `mllm-assets train` makes a newest run that was not."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import is_complete, read_manifest, slug
from mllm_assets.errors import MllmAssetsError
from mllm_assets.layout import Layout
from mllm_assets.project.read import materialize_command
from mllm_assets.training.fingerprint import semantic_values
from mllm_assets.training.recipe import load_recipe, with_config_files
from mllm_assets.training.spec import TrainSpec

# What a launch can say in place of the recipe: the fields of `CheckpointConfig`
LAUNCHPAD = {"max_steps", "num_train_epochs", "learning_rate", "max_samples"}


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
    """What to do for a run's metrics: the asset takes this very run where it is told to train what it trained."""
    recipe = run_dir.parent.name
    command, shown = materialize_command(f"{recipe}/eval_metrics"), layout.relative(run_dir)
    other = _other_values(layout, run_dir)
    if other and set(other) <= LAUNCHPAD and None not in other.values():
        config = json.dumps({"ops": {f"{recipe}__checkpoint": {"config": other}}})
        command += f" --config-json {shlex.quote(config)}"
    elif other:
        values = ", ".join(f"{key}: {json.dumps(value)}" for key, value in other.items())
        return (
            f"To evaluate {shown}: `mllm-assets evaluate {shlex.quote(shown)}` scores its checkpoints. Its recipe's "
            f"file says otherwise now; with {values} in there, this takes the run: {command}"
        )
    return f"To evaluate {shown}: {command} (it takes this run while data and model are as they were)."


def _other_values(layout: Layout, run_dir: Path) -> dict[str, Any]:
    """What a run trained otherwise than its recipe's file says now: by an override, or before the file changed."""
    trained = semantic_values(TrainSpec.from_dict(read_manifest(run_dir)["recipe"]))
    for path in layout.root.glob("configs/*.yaml"):
        if slug(path.stem) == run_dir.parent.name:
            try:
                written = semantic_values(with_config_files(load_recipe(path), layout.root).spec)
            except MllmAssetsError:
                return {}  # the command says what is wrong with it
            return {key: value for key, value in trained.items() if value != written.get(key)}
    return {}


def evaluation_of(layout: Layout, run_dir: Path) -> EvaluatedRun | None:
    """The last evaluation of a run's weights."""
    weights = read_manifest(run_dir)["weights_digest"]
    runs = evaluated_runs(layout, run_dir.parent.name)
    return next((run for run in runs if read_manifest(run.run_dir)["weights_digest"] == weights), None)


def _is_run(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and is_complete(path)
