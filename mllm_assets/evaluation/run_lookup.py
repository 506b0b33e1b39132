"""Which runs of a recipe were evaluated, and what by: a plain `mllm-assets train` makes a newest run that was not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import is_complete, made_order, read_manifest
from mllm_assets.errors import IntegrityError, MllmAssetsError, RecipeError
from mllm_assets.layout import Layout
from mllm_assets.project.read import materialize_command, plain_name, recipe_file, require_known_recipe, why_no_latest
from mllm_assets.recipe.load import load_recipe, with_config_files
from mllm_assets.training.runs.plan import overridden, semantic_values, shown_overrides
from mllm_assets.training.runs.run_file import RUN_FILE, read_run_file, spec_of_run


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedRun:
    """A run, the metrics of its weights, and the predictions that they were made of."""

    run_dir: Path
    metrics_dir: Path
    predictions_dir: Path


def evaluated_runs(layout: Layout, recipe: str) -> Iterator[EvaluatedRun]:
    """The runs of a recipe that were evaluated, the last evaluation first."""
    parent = layout.outputs / recipe
    complete = [path for path in parent.glob("*/") if not path.is_symlink() and is_complete(path)]
    runs = {read_manifest(path).get("weights_digest"): path for path in complete}
    found = [path for path in parent.glob("eval_metrics/[!.]*") if is_complete(path)]
    for metrics_dir in sorted(found, key=made_order, reverse=True):
        inputs = read_manifest(metrics_dir)["inputs"]
        if run_dir := runs.get(inputs.get("weights_digest")):
            predictions_dir = layout.root / inputs.get("predictions_path", "")
            yield EvaluatedRun(run_dir=run_dir, metrics_dir=metrics_dir, predictions_dir=predictions_dir)


def find_run(layout: Layout, recipe: str, overrides: Sequence[str] = ()) -> Path:
    """The newest run of a recipe as written, of one with overrides, or of `<recipe>/<fingerprint>`.

    Raises:
        IntegrityError: There is none, or it is not finished. Says which there are, or how it goes on.
        RecipeError: The overrides do not fit the recipe, or no file in `configs/` has its name.
    """
    recipe = plain_name(layout, recipe)
    run_dir = layout.outputs / recipe
    if is_complete(run_dir):
        return run_dir.resolve()
    require_finished(layout, run_dir)
    wanted: dict[str, Any] = {}
    if overrides:
        require_known_recipe(layout, recipe)
        path = recipe_file(layout, recipe)
        if path is None:
            raise RecipeError(f"{layout.configs} has no file of {recipe}. Name its run: {recipe}/<fingerprint>.")
        wanted = overridden(load_recipe(path, overrides))
    if not wanted:
        latest = (run_dir / "latest").resolve()
        if not latest.is_dir():
            raise IntegrityError(why_no_latest(layout, recipe))
        return latest
    runs = {path: read_manifest(path) for path in run_dir.glob("*/") if not path.is_symlink() and is_complete(path)}
    found = [path for path, manifest in runs.items() if manifest.get("overrides") == wanted]
    if not found:
        others = sorted({shown_overrides(m["overrides"]) for m in runs.values() if m.get("overrides")})
        there = f"There are runs with: {'; '.join(others)}" if others else "No run of it has overrides"
        raise IntegrityError(f"{recipe} was not trained with {shown_overrides(wanted)}. {there}.")
    return max(found, key=made_order).resolve()


def require_finished(layout: Layout, run_dir: Path) -> None:
    """Refuse a run that has begun and is not finished.

    Raises:
        IntegrityError: It is one. Gives the command that began it, which goes on from its last checkpoint.
    """
    if is_complete(run_dir) or not (run_dir / RUN_FILE).is_file():
        return
    recipe, kept = run_dir.resolve().parent.name, read_run_file(run_dir)
    overrides = kept.get("overrides") or _differing(layout, run_dir, kept.get("starts_from", {}).get("recipe"))
    command = " ".join(filter(None, [materialize_command(recipe), shown_overrides(overrides)]))
    raise IntegrityError(
        f"{layout.relative(run_dir)} is not finished. Unless something trains it now, it goes on from its last "
        f"checkpoint, while data and model are as they were: {command}"
    )


def how_to_evaluate(layout: Layout, run_dir: Path) -> str:
    """How to get a run's metrics: the asset takes this run when launched with the values that it was trained with."""
    recipe = run_dir.parent.name
    command, shown = materialize_command(f"{recipe}/eval_metrics"), layout.relative(run_dir)
    other = shown_overrides(_differing(layout, run_dir, read_manifest(run_dir)["recipe"]))
    note = "it takes this run while data and model are as they were"
    return f"To evaluate {shown}: {' '.join(filter(None, [command, other]))} ({note})."


def _differing(layout: Layout, run_dir: Path, recipe: Any) -> dict[str, Any]:
    """The values in which a run differs from its recipe's file now: by an override, or because the file changed."""
    trained = semantic_values(spec_of_run(recipe, run_dir))
    path = recipe_file(layout, run_dir.parent.name)
    try:
        written = semantic_values(with_config_files(load_recipe(path), layout.root).spec) if path else trained
    except MllmAssetsError:
        return {}  # the command says what is wrong with it
    return {key: value for key, value in trained.items() if value != written.get(key)}


def evaluation_of(layout: Layout, run_dir: Path) -> EvaluatedRun | None:
    """The last evaluation of a run's weights."""
    weights = read_manifest(run_dir)["weights_digest"]
    runs = evaluated_runs(layout, run_dir.parent.name)
    return next((run for run in runs if read_manifest(run.run_dir)["weights_digest"] == weights), None)
