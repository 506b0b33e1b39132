"""One page on two runs: loss curves, metrics side by side, and what both models answer on the same samples."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from mllm_assets.artifacts import Manifest, read_manifest, write_text_atomic
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.checkpoint_metrics import find_run
from mllm_assets.evaluation.gallery import HTML_THUMBNAIL_PX, MAX_HTML_SAMPLES, evenly_spaced, thumbnail
from mllm_assets.evaluation.intervals import gain_text
from mllm_assets.evaluation.metrics import gains_over_release, read_metrics
from mllm_assets.evaluation.run_lookup import evaluated_runs, evaluation_of, how_to_evaluate, require_finished
from mllm_assets.evaluation.scores import in_order
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout
from mllm_assets.pages import page_template
from mllm_assets.training.runs.history import (
    TRAINER_LOG,
    columns,
    curve,
    measured_curves,
    read_log,
    smoothed,
    usual_weight,
)


def compare(layout: Layout, names: Sequence[str], output: Path, *, notify: Callable[[str], None] = print) -> Path:
    """Write the page.

    Args:
        layout: The project.
        names: Two runs, each a directory or a recipe's name.
        output: The page; it needs no other file.
        notify: Called when another run than the newest is shown, or an entry is left out.

    Raises:
        IntegrityError: One of them is not a run or was not evaluated, or they share no samples.
    """
    runs = [_read(layout, name, notify) for name in names]
    if runs[0].directory == runs[1].directory:
        notify(f"both are the same run, {layout.relative(runs[0].directory)}")
    if runs[0].title == runs[1].title:
        runs = [replace(run, title=f"{run.title}, {run.directory.name[:8]}") for run in runs]
    first, second = (run.predictions for run in runs)
    gains = gains_over_release(second, first)
    if not gains:
        raise IntegrityError(
            f"{names[0]} and {names[1]} were asked nothing in common, so they cannot be compared"
            f"{_how_many(runs)}. Evaluate both on the same samples of the same entries."
        )
    left_out = sorted({name for run in runs for name in run.metrics["entries"]} - set(gains))
    if left_out:
        notify(f"left out, because the runs were not asked the same samples: {', '.join(left_out)}{_how_many(runs)}")
    samples = pair_samples(first, second, set(gains))
    page = page_template("mllm_assets.evaluation", "comparison.html.jinja").render(
        titles=[run.title for run in runs],
        facts=[_facts(layout, run) for run in runs],
        curves=_curves(runs),
        metrics=_metric_rows([run.metrics for run in runs], gains),
        num_samples=len(samples),
        left_out=left_out,
        samples=[
            {**sample, "thumbnails": [thumbnail(layout.data / path, HTML_THUMBNAIL_PX) for path in sample["images"]]}
            for sample in evenly_spaced(samples, MAX_HTML_SAMPLES)
        ],
    )
    write_text_atomic(output, page)
    return output


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """A run and its evaluation."""

    title: str
    directory: Path
    manifest: Manifest
    metrics: Mapping[str, Any]
    predictions: pa.Table


def _read(layout: Layout, name: str, notify: Callable[[str], None]) -> _Run:
    """A run and its evaluation. A recipe's name means its newest run, or else the last that was evaluated."""
    run_dir = find_run(layout, name)
    require_finished(layout, run_dir)
    found = evaluation_of(layout, run_dir)
    if found is None and not Path(name).is_dir() and (found := next(evaluated_runs(layout, name), None)):
        notify(
            f"the newest run of {name} was not evaluated; the page shows {layout.relative(found.run_dir)}, "
            f"the last that was. {how_to_evaluate(layout, run_dir)}"
        )
        run_dir = found.run_dir
    if found is None:
        raise IntegrityError(
            f"{name} was not evaluated: there are no metrics of {layout.relative(run_dir)}. "
            f"{how_to_evaluate(layout, run_dir)}"
        )
    return _Run(
        title=run_dir.parent.name,
        directory=run_dir,
        manifest=read_manifest(run_dir),
        metrics=read_metrics(found.metrics_dir),
        predictions=read_predictions(found.predictions_dir),
    )


def _how_many(runs: Sequence[_Run]) -> str:
    """How many samples of each entry each run was asked."""
    counts = [
        ", ".join(f"{entry} {scored['num_samples']}" for entry, scored in run.metrics["entries"].items())
        for run in runs
    ]
    return f" (samples of the first: {counts[0]}; of the second: {counts[1]})"


def _facts(layout: Layout, run: _Run) -> dict[str, Any]:
    manifest = run.manifest
    recipe = manifest["recipe"]
    return {
        "run": layout.relative(run.directory),
        "steps": manifest["num_steps"],
        "trains": f"{recipe['finetuning_type']}, {manifest['num_trainable_params']:,} parameters",
        "learning rate": recipe["learning_rate"],
        "judged on": ", ".join(
            f"{entry}: {scored['num_samples']} samples" for entry, scored in run.metrics["entries"].items()
        ),
        "training": f"{manifest['train_wall_s']:.0f} s, {manifest['samples_per_s']:.1f} samples/s",
    }


def _metric_rows(metrics: Sequence[Mapping[str, Any]], gains: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for entry, gained in gains.items():
        models = [some["entries"][entry]["models"]["tuned"] for some in metrics]
        for name in in_order(name for name in models[0] if name in models[1]):
            gain = gained.get(name) or {}
            is_sure = gain.get("low") is not None
            rows.append(
                {
                    "entry": entry,
                    "metric": name,
                    "values": [model[name] for model in models],
                    "gain": gain_text(gained.get(name)),
                    "verdict": "better"
                    if is_sure and gain["low"] > 0
                    else "worse"
                    if is_sure and gain["high"] < 0
                    else "",
                }
            )
    return rows


def pair_samples(first: pa.Table, second: pa.Table, entries: set[str]) -> list[dict[str, Any]]:
    """Both tuned rows of each sample; `gain_nats` is how much lower the second one's loss is."""
    by_place = {(row["entry"], row["row_index"]): row for row in first.to_pylist() if row["model"] == "tuned"}
    samples = []
    for row in second.to_pylist():
        if row["model"] == "tuned" and row["entry"] in entries:
            other = by_place[row["entry"], row["row_index"]]
            gain_nats = other["loss_nats"] - row["loss_nats"]
            samples.append({**row, "rows": [other, row], "gain_nats": gain_nats})
    return sorted(samples, key=lambda sample: -abs(sample["gain_nats"]))


def _curves(runs: Sequence[_Run]) -> str | None:
    """Training and evaluation losses of both runs in one picture, as a `data:` URI."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    logged = False
    for run, color in zip(runs, ("#4f43dd", "#d9730d"), strict=True):
        log = read_log(run.directory / TRAINER_LOG)
        losses, evaluated = curve(log, "loss"), measured_curves(log)
        logged = logged or bool(losses or evaluated)
        faint, drawn = {"color": color, "alpha": 0.25}, {"color": color, "markersize": 3}
        axes.plot(*columns(losses), "-", **faint)
        axes.plot(*columns(smoothed(losses, usual_weight(len(losses)))), "-", label=f"{run.title}, loss", **drawn)
        for key, points in evaluated.items():
            axes.plot(*columns(points), "o--", label=f"{run.title}, {key}", **drawn)
    if not logged:
        return None
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
