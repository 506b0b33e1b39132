"""A finished sweep as files: its trials, its pictures, and the best values as a recipe that is ready for `configs/`."""

import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from mllm_assets.artifacts import (
    digest_json,
    is_complete,
    is_sound,
    read_manifest,
    staged_directory,
    write_json_atomic,
    write_manifest,
    write_text_atomic,
)
from mllm_assets.errors import IntegrityError
from mllm_assets.layout import Layout
from mllm_assets.recipe.load import Recipe
from mllm_assets.training.runs.sweep import Trial, best_of, keys_of, unbeaten
from mllm_assets.training.runs.sweep_spec import SweepSpec, shown

TRIALS_FILE = "trials.json"
PICTURES = ("parallel_coordinates", "importances", "pareto_front")
_INCHES = (8.8, 4.2)  # at 100 dpi as wide as the window in which Dagster shows it


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenBy:
    """The sweep that chose a run's values."""

    recipe: str
    num_trials: int
    num_pruned: int
    entries: tuple[str, ...]  # that they were compared on
    objectives: tuple[str, ...] = ("eval_loss",)


def publish_sweep(layout: Layout, recipe: Recipe, spec: SweepSpec, trials: list[Trial]) -> Path:
    """Write a sweep's result to `outputs/<recipe>/sweep/<digest>`, and return that; a sound one is kept.

    Raises:
        IntegrityError: No trial was finished.
    """
    best = best_of(trials, spec)
    if best is None:
        raise IntegrityError(f"No trial of the sweep of {recipe.name} was finished.")
    ranked = sorted((trial for trial in trials if trial.scores), key=lambda trial: trial.places(spec.compared_by))
    places = {trial.number: place for place, trial in enumerate(ranked, start=1)}
    best_numbers = {trial.number for trial in unbeaten(trials, spec)}
    found = [
        {**asdict(trial), "place": places.get(trial.number), "is_unbeaten": trial.number in best_numbers}
        for trial in trials
    ]
    digest = digest_json([recipe.name, asdict(spec), found])
    target = layout.sweep(recipe.name, digest[:16])
    if is_sound(target):
        return target
    with staged_directory(target) as staging:
        write_json_atomic(staging / TRIALS_FILE, found)
        write_text_atomic(staging / winner_file(recipe), winner_recipe(recipe, spec, trials, best))
        for name, png in _pictures(spec, trials).items():
            (staging / f"{name}.png").write_bytes(png)
        write_manifest(
            staging,
            {
                "digest": digest,
                "recipe": recipe.name,
                "best_run": best.run,
                "best_values": dict(best.values),
                "objectives": keys_of(spec),
                "scores": dict(best.scores),
                "eval_entries": list(recipe.spec.eval_entries),
                "num_trials": len(trials),
                "num_pruned": sum(trial.state == "pruned" for trial in trials),
            },
        )
    return target


def winner_file(recipe: Recipe) -> str:
    """The name of the winner's recipe file, which its assets are called by."""
    return f"{recipe.name}_swept.yaml"


def winner_recipe(recipe: Recipe, spec: SweepSpec, trials: list[Trial], best: Trial) -> str:
    """The recipe with the best values, as its file."""
    values = {**recipe.values, **best.values, "output_dir": f"outputs/{recipe.name}_swept"}
    entries = ", ".join(recipe.spec.eval_entries)
    first, *others = keys_of(spec)
    also = f" before {' and '.join(others)}" if others else ""
    head = (
        f"### The best of {len(trials)} trials of the sweep of {recipe.path.name} by {first}{also} on {entries}: "
        f"{shown(best.scores)}.\n### That is too good, since it was chosen by it: the test split judges.\n"
    )
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def chosen_by(layout: Layout, fingerprint: str) -> ChosenBy | None:
    """The sweep whose best run computed the same as a run with this name, the newest of several; None if no one."""
    for path in sorted(layout.outputs.glob("*/sweep/[!.]*"), key=lambda path: path.stat().st_mtime, reverse=True):
        if not is_complete(path):
            continue
        try:
            manifest = read_manifest(path)
        except IntegrityError:
            continue
        if manifest.get("best_run", "").partition("-")[0] == fingerprint.partition("-")[0]:
            return ChosenBy(
                recipe=manifest["recipe"],
                num_trials=manifest["num_trials"],
                num_pruned=manifest["num_pruned"],
                entries=tuple(manifest["eval_entries"]),
                objectives=tuple(manifest.get("objectives", ["eval_loss"])),
            )
    return None


def _pictures(spec: SweepSpec, trials: list[Trial]) -> dict[str, bytes]:
    """What Optuna draws of the trials: which values went together, and which parameter mattered."""
    import matplotlib

    matplotlib.use("Agg")
    import optuna
    from optuna.trial import TrialState, create_trial
    from optuna.visualization import matplotlib as drawn

    from mllm_assets.training.runs.sweep import distributions_of

    distributions, keys = distributions_of(spec), keys_of(spec)
    study = optuna.create_study(
        directions=["maximize" if one.higher_is_better else "minimize" for one in spec.compared_by]
    )
    for trial in trials:
        if trial.state == "finished":
            study.add_trial(
                create_trial(
                    state=TrialState.COMPLETE,
                    params=dict(trial.values),
                    distributions=distributions,
                    values=[trial.scores[key] for key in keys],
                )
            )
    # what Optuna draws of one value is drawn of the objective that decides
    one = {"target": lambda trial: trial.values[0], "target_name": keys[0]}
    found: dict[str, bytes] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's experimental ones
        if len(study.trials) > 1:
            found["parallel_coordinates"] = _png(drawn.plot_parallel_coordinate(study, **one))
        if len(study.trials) > 1 and len(keys) in (2, 3):
            found["pareto_front"] = _png(drawn.plot_pareto_front(study, target_names=keys))
        if len(study.trials) > 3 and len(distributions) > 1:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found["importances"] = _png(drawn.plot_param_importances(study, evaluator=evaluator, **one))
    return found


def _png(axes: Any) -> bytes:
    figure = axes.figure
    figure.set_size_inches(*_INCHES)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def read_trials(directory: Path) -> list[Mapping[str, Any]]:
    """What `publish_sweep` wrote."""
    return json.loads((directory / TRIALS_FILE).read_text(encoding="utf-8"))
