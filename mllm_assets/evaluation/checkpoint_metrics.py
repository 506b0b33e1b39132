"""A run's checkpoints, each evaluated as its finished model would be: metrics over steps, and the best of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json, is_complete, is_sound, read_manifest, write_json_atomic
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import IntegrityError, RecipeError
from mllm_assets.evaluation.metrics import compute_metrics
from mllm_assets.evaluation.scores import METRICS, in_order
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout
from mllm_assets.project.read import plain_name, why_no_latest
from mllm_assets.training.runs.models import checkpoint_digest
from mllm_assets.training.runs.run_file import read_starting_model
from mllm_assets.worker.launch import run_worker
from mllm_assets.worker.tasks import Accelerator, EvaluateTask, EvaluationSettings

METRICS_FILE, PLOT_FILE = "checkpoint_metrics.json", "checkpoint_metrics.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class OverSteps:
    """Metrics of each step: `steps[step][entry][metric]`; `best[entry]` maps loss and primary metric to a step.

    `max_samples` is the limit that was set, None for all samples, and `num_samples[entry]` how many there were.
    """

    steps: Mapping[int, Mapping[str, Mapping[str, float]]]
    primary: Mapping[str, str]
    best: Mapping[str, Mapping[str, int]]
    num_samples: Mapping[str, int]
    max_samples: int | None

    def to_dict(self) -> dict[str, Any]:
        """Everything but `primary`, JSON-able."""
        counts = {"max_samples": self.max_samples, "num_samples": dict(self.num_samples)}
        return {**counts, "steps": self.steps, "best": self.best}

    def of_samples(self, entry: str) -> str:
        """How many samples an entry's figures are of, for a heading."""
        spread = " spread over it" if self.max_samples is not None else ""
        return f"{entry}, {self.num_samples[entry]} samples{spread}"


def find_run(layout: Layout, name: str) -> Path:
    """The run directory that a path, `<recipe>/<fingerprint>` or a recipe's name (its newest finished run) means.

    Raises:
        IntegrityError: Not found. Says what can be given.
    """
    short = plain_name(layout, name)
    for directory in (Path(name), layout.outputs / short, layout.outputs / short / "latest"):
        if directory.is_dir() and (directory / "run.json").is_file():
            return directory.resolve()
    if (layout.outputs / short).is_dir() or (layout.root / "configs" / f"{short}.yaml").is_file():
        raise IntegrityError(why_no_latest(layout, short))
    raise IntegrityError(
        f"{name} is neither the directory of a training run nor a recipe that was trained below {layout.outputs}. Give "
        "one such as outputs/<recipe>/latest or <recipe>/<fingerprint>; `mllm-assets run RECIPE` makes one."
    )


def chosen_checkpoints(run_dir: Path, wanted: str) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run by step: all of them, or the one of a step.

    Raises:
        IntegrityError: There is none, or not this one; names those that exist.
    """
    found = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in run_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and is_complete(path)
    }
    if wanted == "all" and found:
        return sorted(found.items())
    step = wanted.removeprefix("checkpoint-")
    if step.isdecimal() and int(step) in found:
        return [(int(step), found[int(step)])]
    listed = ", ".join(str(step) for step in sorted(found)) or "none: set save_steps in the recipe"
    raise IntegrityError(f"{run_dir} has no complete checkpoint {wanted!r}; it has: {listed}.")


def evaluate_checkpoints(
    layout: Layout, run_dir: Path, wanted: str, *, accelerator: Accelerator, settings: EvaluationSettings
) -> OverSteps:
    """Score checkpoints on the recipe's evaluation entries, and draw their metrics over steps into the run's folder.

    A checkpoint that was evaluated with these settings before is read, not asked again. The run may be unfinished;
    `wanted` is "all" or a step.

    Raises:
        RecipeError: The recipe has no `eval_dataset`.
        IntegrityError: No such checkpoint, or it is damaged.
        ModelError: The run does not say which model it started from, or that model is gone.
    """
    chosen = chosen_checkpoints(run_dir, wanted)
    start = read_starting_model(run_dir)
    spec = start.spec
    if not spec.eval_entries:
        raise RecipeError(f"The recipe of {run_dir} has no eval_dataset. Name one, and train again.")
    dataset = Dataset.of_recipe(spec, layout.root, read_part=None)
    data = {name: dataset.entry(name).digest for name in spec.eval_entries}
    answers = [text for name in spec.train_entries for text in dataset.entry(name).answers]
    steps, primary, num_samples = {}, {}, {}
    for step, checkpoint in chosen:
        files = read_manifest(checkpoint)["files"]
        identity = {"engine_version": __version__, "files": files, "data": data, **settings.conditions(spec)}
        task = EvaluateTask(
            recipe=spec,
            entries=spec.eval_entries,
            recipe_name=f"{run_dir.parent.name}, step {step}",
            model_dir=checkpoint,
            base_model_dir=start.model_dir,
            data_dir=dataset.data_dir,
            media_dir=dataset.media_dir,
            data_digests=data,
            model_digests={"tuned": checkpoint_digest(checkpoint)},
            directory=layout.predictions(run_dir.parent.name, digest_json(identity)[:16]),
            settings=settings,
            models=("tuned",),
            features_root=layout.features if spec.freeze_vision_tower else None,
            rows_root=layout.rows,
            accelerator=accelerator,
        )
        if not is_sound(task.directory):
            run_worker(task)
        entries = compute_metrics(read_predictions(task.directory), answers)["entries"]
        steps[step] = {entry: scored["models"]["tuned"] for entry, scored in entries.items()}
        primary |= {entry: scored["primary"] for entry, scored in entries.items()}
        num_samples |= {entry: scored["num_samples"] for entry, scored in entries.items()}
    result = OverSteps(
        steps=steps,
        primary=primary,
        best=_best(steps, primary),
        num_samples=num_samples,
        max_samples=settings.max_samples,
    )
    if len(steps) > 1:
        write_json_atomic(run_dir / METRICS_FILE, result.to_dict())
        plot(result, run_dir / PLOT_FILE)
    return result


def _best(
    steps: Mapping[int, Mapping[str, Mapping[str, float]]], primary: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Return the best step of each entry by loss and by primary metric; of equally good ones the first."""
    best: dict[str, dict[str, int]] = {}
    for entry, metric in primary.items():
        for name in ("loss", metric):
            sign = 1 if METRICS[name].higher_is_better else -1
            best.setdefault(entry, {})[name] = max(steps, key=lambda s, n=name, g=sign: (g * steps[s][entry][n], -s))
    return best


def plot(result: OverSteps, path: Path) -> None:
    """Draw loss and primary metric over steps, a row for each entry, the best step marked."""
    from matplotlib.figure import Figure

    entries, steps = list(result.primary), sorted(result.steps)
    figure = Figure(figsize=(9, 3.4 * len(entries)), dpi=100, layout="constrained")
    grid = figure.subplots(len(entries), 2, squeeze=False)
    for row, entry in zip(grid, entries, strict=True):
        for axes, metric in zip(row, ("loss", result.primary[entry]), strict=True):
            _draw(axes, steps, [result.steps[step][entry][metric] for step in steps], result.best[entry][metric])
            label = f"{metric.replace('_', ' ')} ({METRICS[metric].unit})"
            axes.set(title=result.of_samples(entry), xlabel="step", ylabel=label)
            shuffled = [result.steps[step][entry].get("loss_shuffled") for step in steps]
            if metric == "loss" and None not in shuffled:
                axes.plot(steps, shuffled, color="#7f7f7f", linestyle="--", marker="o", markersize=3)
                axes.legend(["own image", "best", "another image"])
    figure.savefig(path, metadata={"Software": None})


def _draw(axes: Any, steps: Sequence[int], values: Sequence[float], best: int) -> None:
    axes.plot(steps, values, color="#4f43dd", marker="o", markersize=3)
    axes.plot([best], [values[steps.index(best)]], color="#1a7f4b", marker="*", markersize=13, linestyle="none")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)


def describe(result: OverSteps) -> str:
    """The metrics as a table for a terminal, an entry after another."""
    lines = []
    for entry, metric in result.primary.items():
        scored = {step: values[entry] for step, values in sorted(result.steps.items())}
        first = next(iter(scored.values()))
        names = in_order(name for name in first if all(name in values for values in scored.values()))
        widths = {name: max(len(name), 8) + 2 for name in names}  # a perplexity has up to 8 characters
        header = "".join(f"{name:>{width}}" for name, width in widths.items())
        lines.append(f"{result.of_samples(entry)}\n  {'step':>8}{header}")
        for step, values in scored.items():
            lines.append(f"  {step:>8}" + "".join(f"{values[name]:>{width}.4f}" for name, width in widths.items()))
        best = result.best[entry]
        lines.append(f"  best: step {best['loss']} by loss, step {best[metric]} by {metric}")
    return "\n".join(lines)
