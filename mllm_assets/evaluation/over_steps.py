"""A run's checkpoints, each evaluated as its finished model would be: metrics over steps, and the best of them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json, is_complete, read_manifest, write_json_atomic
from mllm_assets.data.sharegpt import entry_digest, load_rows
from mllm_assets.errors import IntegrityError, RecipeError
from mllm_assets.evaluation.metrics import compute_metrics
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout
from mllm_assets.training.launch import run_worker
from mllm_assets.training.run_file import read_run_file
from mllm_assets.training.spec import TrainSpec

METRICS_FILE, PLOT_FILE = "checkpoint_metrics.json", "checkpoint_metrics.png"
LOWER_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True, kw_only=True, slots=True)
class OverSteps:
    """Metrics of each step: `steps[step][entry][metric]`; `best[entry]` maps loss and primary metric to a step.

    `max_samples` is what was asked for, None for all, and `num_samples[entry]` how many that were.
    """

    steps: Mapping[int, Mapping[str, Mapping[str, float]]]
    primary: Mapping[str, str]
    best: Mapping[str, Mapping[str, int]]
    num_samples: Mapping[str, int]
    max_samples: int | None

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return {
            "max_samples": self.max_samples, "num_samples": dict(self.num_samples), "steps": self.steps,
            "best": self.best,
        }  # fmt: skip

    def of_samples(self, entry: str) -> str:
        """How many samples an entry's figures are of, for a heading."""
        first = "the first " if self.max_samples is not None else ""
        return f"{entry}, {first}{self.num_samples[entry]} samples"


def find_run(layout: Layout, name: str) -> Path:
    """The run directory that a path, `<recipe>/<fingerprint>` or a recipe's name (its newest finished run) stands for.

    Raises:
        IntegrityError: There is none. Says what can be given.
    """
    for directory in (Path(name), layout.outputs / name, layout.outputs / name / "latest"):
        if directory.is_dir() and (directory / "run.json").is_file():
            return directory.resolve()
    raise IntegrityError(
        f"{name} is neither the directory of a training run nor a recipe that was trained below {layout.outputs}. Give "
        "one such as outputs/<recipe>/latest or <recipe>/<fingerprint>."
    )


def chosen_checkpoints(run_dir: Path, wanted: str) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run by step: all of them, or the one of a step.

    Raises:
        IntegrityError: There is none, or not this one; names those that are there.
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
    layout: Layout,
    run_dir: Path,
    wanted: str,
    *,
    accelerator: Mapping[str, Any],
    max_samples: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> OverSteps:
    """Score checkpoints on the recipe's evaluation entries, and draw their metrics over steps into the run's folder.

    A checkpoint that was evaluated so before is read, not asked again.

    Args:
        layout: The project.
        run_dir: A run, finished or not.
        wanted: "all", or a step.
        accelerator: As in every request to a worker.
        max_samples: Of each entry; all by default.
        max_new_tokens: An answer is cut after so many.
        batch_size: Samples asked at once.

    Raises:
        RecipeError: The recipe has no `eval_dataset`.
        IntegrityError: No such checkpoint, or it is damaged.
        ModelError: The run does not say which model it started from.
    """
    chosen = chosen_checkpoints(run_dir, wanted)
    began = read_run_file(run_dir).get("starts_from")
    if began is None:
        raise IntegrityError(f"{run_dir} does not say which model it started from. Train it again to evaluate it.")
    spec = TrainSpec.from_dict(began["recipe"])
    if not spec.eval_entries:
        raise RecipeError(f"The recipe of {run_dir} has no eval_dataset. Name one, and train again.")
    data_dir = layout.root / spec.dataset_dir
    how = {
        **{name: getattr(spec, name) for name in ("cutoff_len", "image_max_pixels", "image_min_pixels", "template")},
        "enable_thinking": spec.enable_thinking,
        "max_samples": max_samples,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
    }
    data = {entry: entry_digest(data_dir, entry) for entry in spec.eval_entries}
    answers = [row.messages[-1].content for entry in spec.train_entries for row in load_rows(data_dir, entry)]
    steps, primary, num_samples = {}, {}, {}
    for step, checkpoint in chosen:
        identity = {"engine_version": __version__, "files": read_manifest(checkpoint)["files"], "data": data, **how}
        directory = layout.predictions(run_dir.parent.name, digest_json(identity)[:16])
        request = {
            "task": "evaluate", "recipe_name": f"{run_dir.parent.name}, step {step}", "models": ["tuned"],
            "model_dir": str(checkpoint), "base_model_dir": str((run_dir / began["model_dir"]).resolve()),
            "data_dir": str(data_dir), "entries": list(spec.eval_entries), "directory": str(directory),
            "recipe": spec.to_dict(), "features_root": str(layout.features) if spec.freeze_vision_tower else None,
            "accelerator": dict(accelerator), **how,
        }  # fmt: skip
        if not is_complete(directory):
            run_worker(request)
        entries = compute_metrics(read_predictions(directory), answers)["entries"]
        steps[step] = {entry: scored["models"]["tuned"] for entry, scored in entries.items()}
        primary |= {entry: scored["primary"] for entry, scored in entries.items()}
        num_samples |= {entry: scored["num_samples"] for entry, scored in entries.items()}
    best = _best(steps, primary)
    result = OverSteps(steps=steps, primary=primary, best=best, num_samples=num_samples, max_samples=max_samples)
    if len(steps) > 1:
        write_json_atomic(run_dir / METRICS_FILE, result.to_dict())
        plot(result, run_dir / PLOT_FILE)
    return result


def _best(
    steps: Mapping[int, Mapping[str, Mapping[str, float]]], primary: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Of steps that are equally good the first."""
    best: dict[str, dict[str, int]] = {}
    for entry, metric in primary.items():
        for name in ("loss", metric):
            sign = -1 if name in LOWER_IS_BETTER else 1
            best.setdefault(entry, {})[name] = max(steps, key=lambda s, n=name, g=sign: (g * steps[s][entry][n], -s))
    return best


def plot(result: OverSteps, path: Path) -> None:
    """Draw loss and primary metric over steps, a row for each entry, the best step marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries, steps = list(result.primary), sorted(result.steps)
    figure = Figure(figsize=(9, 3.4 * len(entries)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(entries), 2, squeeze=False)
    for row, entry in zip(grid, entries, strict=True):
        for axes, metric in zip(row, ("loss", result.primary[entry]), strict=True):
            _draw(axes, steps, [result.steps[step][entry][metric] for step in steps], result.best[entry][metric])
            unit = " (nats a token)" if metric == "loss" else ""
            axes.set(title=result.of_samples(entry), xlabel="step", ylabel=metric.replace("_", " ") + unit)
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
        names = list(dict.fromkeys(("loss", "loss_shuffled", metric, "rouge_l", "bleu", "cider_d")))
        names = [name for name in names if all(name in scored[entry] for scored in result.steps.values())]
        lines.append(f"{result.of_samples(entry)}\n  {'step':>8}" + "".join(f"{name:>16}" for name in names))
        for step, scored in sorted(result.steps.items()):
            lines.append(f"  {step:>8}" + "".join(f"{scored[entry][name]:>16.4f}" for name in names))
        found = result.best[entry]
        lines.append(f"  best: step {found['loss']} by loss, step {found[metric]} by {metric}")
    return "\n".join(lines)


def to_json(result: OverSteps) -> str:
    """The same for scripts."""
    return json.dumps(result.to_dict(), indent=2)
