"""Metrics of the base and the tuned model per entry, next to the most common answer, for which no image is needed."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import mllm_assets.evaluation.structured_scores  # noqa: F401  # registers its metrics
from mllm_assets import __version__
from mllm_assets.artifacts import (
    digest_json,
    is_sound,
    next_number,
    read_manifest,
    require_sound,
    staged_directory,
    write_json_atomic,
    write_manifest,
)
from mllm_assets.errors import DataError, IntegrityError, ModelError
from mllm_assets.evaluation.intervals import paired_gain
from mllm_assets.evaluation.scores import METRICS, NO_LABEL, SEVERAL_LABELS, Answers, definitions, find_label
from mllm_assets.evaluation.table import is_of_pairs, read_predictions, with_run
from mllm_assets.layout import Layout

MOST_COMMON = "most_common_answer"
METRICS_FILE = "eval_metrics.json"


def of_answers() -> dict[str, bool]:
    """Whether more is better of each registered metric that answers alone give, by its name."""
    return {name: metric.higher_is_better for name, metric in METRICS.items() if metric.of_answers}


def of_each_answer() -> dict[str, bool]:
    """Of those the ones that have a value for each answer, which the others do not change."""
    return {name: better for name, better in of_answers().items() if METRICS[name].score and METRICS[name].of_one}


def compute_metrics(predictions: pa.Table, train_answers: Sequence[str]) -> dict[str, Any]:
    """Score predictions per entry and model.

    Args:
        predictions: Rows of `evaluation.table.SCHEMA`; each model has the same samples of each entry.
        train_answers: The answers that were trained on. The most common one is scored as if a model always gave it.

    Returns:
        JSON-able: `entries[entry]` holds `models[model][metric]` (model "base", "tuned" or "most_common_answer"),
        `gains` (mean and interval of paired per-sample differences, positive when better), `primary` (the metric that
        gates look at), `num_samples`, `samples_digest`, `most_common_answer` and, where samples have
        labels, `confusion`; `definitions[metric]` says what each metric is.

    Raises:
        DataError: There is nothing to score, or no training answer.
        IntegrityError: The models were not asked the same samples.
        ModelError: A loss is not finite. Names the model and the sample.
    """
    if not len(predictions):
        raise DataError("There are no predictions to score. Check that the evaluation entries have rows.")
    if not train_answers:
        raise DataError("There are no training answers to compare with. Pass those of the recipe's training entries.")
    most_common = min(Counter(train_answers).items(), key=lambda item: (-item[1], item[0]))[0]
    by_entry: dict[str, list[dict[str, Any]]] = {}
    for row in predictions.to_pylist():
        by_entry.setdefault(row["entry"], []).append(row)
    entries = {entry: _entry_metrics(entry, rows, most_common) for entry, rows in sorted(by_entry.items())}
    if is_of_pairs(predictions):
        for scored in entries.values():
            scored["primary"] = "exact_match"  # how often the preferred answer is ahead
    return {"entries": entries, "definitions": definitions()}


def _entry_metrics(entry: str, rows: list[dict[str, Any]], most_common: str) -> dict[str, Any]:
    by_model = _rows_by_model(entry, rows)
    first = next(iter(by_model.values()))
    answers = {model: answers_of(model_rows) for model, model_rows in by_model.items()}
    one = next(iter(answers.values()))
    labels = one.labels
    answers[MOST_COMMON] = Answers(answers=[most_common] * len(first), references=one.references, labels=labels)
    result = {
        "num_samples": len(first),
        "samples_digest": digest_json([[row["sample_id"], row["reference"]] for row in first]),
        "primary": "label_accuracy" if labels else "rouge_l",
        "most_common_answer": most_common,
        "models": {model: some.totals for model, some in answers.items()},
        "gains": _gains(answers) | {f"{m}_over_shuffled_images": _image_gain(r) for m, r in by_model.items()},
    }
    if labels:
        result["confusion"] = {m: confusion(r, labels) for m, r in by_model.items()}
    return result


def sample_metrics(predictions: pa.Table) -> list[dict[str, float]]:
    """Each row's own metrics by name, in the table's order, without its loss; BLEU and chrF exist only for all rows."""
    rows = predictions.to_pylist()
    result: list[dict[str, float]] = [{} for _ in rows]
    positions: dict[tuple[str, str], list[int]] = {}
    for position, row in enumerate(rows):
        positions.setdefault((row["entry"], row["model"]), []).append(position)
    for group in positions.values():
        answers = replace(answers_of([rows[position] for position in group]), losses=None)
        for metric, values in answers.samples.items():
            for position, value in zip(group, values, strict=True):
                result[position][metric] = float(value)
    return result


def answers_of(rows: Sequence[Mapping[str, Any]]) -> Answers:
    """One model's rows as metrics take them."""
    labels = [row["label"] for row in rows]
    return Answers(
        answers=[row["answer"] for row in rows],
        references=[row["reference"] for row in rows],
        labels=None if None in labels else labels,
        losses=np.array([row["loss_nats"] for row in rows]),
        shuffled_losses=np.array([row["loss_shuffled_nats"] for row in rows], float),  # None becomes NaN
        num_tokens=np.array([row["num_supervised_tokens"] for row in rows]),
        pictures=pictures_of(rows),
    )


def pictures_of(rows: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Number of what each row shows; None where no two rows show the same, or rows are not known to show anything."""
    shown = [tuple(row.get("images") or [row["sample_id"]]) for row in rows]
    numbers = {pictures: number for number, pictures in enumerate(dict.fromkeys(shown))}
    return None if len(numbers) == len(rows) else np.array([numbers[pictures] for pictures in shown])


def _rows_by_model(entry: str, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["model"], row["row_index"])):
        if not math.isfinite(row["loss_nats"]) or not math.isfinite(row["loss_shuffled_nats"] or 0.0):
            raise ModelError(
                f"The {row['model']} model's loss on sample {row['sample_id']} of {entry} is not a finite number. "
                "Train again with a lower learning_rate, or in bf16 instead of fp16."
            )
        by_model.setdefault(row["model"], []).append(row)
    asked = {model: [(row["row_index"], row["sample_id"]) for row in r] for model, r in by_model.items()}
    if len({tuple(a) for a in asked.values()}) > 1:
        sizes = ", ".join(f"{model} {len(a)}" for model, a in asked.items())
        raise IntegrityError(
            f"The models were asked different samples of {entry} ({sizes}). Materialise the predictions again."
        )
    return by_model


def _gains(answers: Mapping[str, Answers]) -> dict[str, dict[str, Any]]:
    if "tuned" not in answers:
        return {}
    others = [model for model in ("base", MOST_COMMON) if model in answers]
    return {f"tuned_over_{model}": answers["tuned"].gains_over(answers[model]) for model in others}


def _image_gain(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How much lower the loss is with the sample's own images than with another's."""
    shown = [row for row in rows if row["loss_shuffled_nats"] is not None]
    gains = np.array([row["loss_shuffled_nats"] - row["loss_nats"] for row in shown])
    return {"loss": paired_gain(gains, pictures_of(shown))} if shown else {}


def confusion(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """Count true labels (rows) against named ones (columns; the last two are "(none)" and "(several)")."""
    known = sorted(set(labels))
    columns = [*known, NO_LABEL, SEVERAL_LABELS]
    counts = [[0] * len(columns) for _ in known]
    for row, label in zip(rows, labels, strict=True):
        counts[known.index(label)][columns.index(find_label(row["answer"], known))] += 1
    return {"labels": known, "named": columns, "counts": counts}


def gains_over_release(predictions: pa.Table, released: pa.Table) -> dict[str, dict[str, Any]]:
    """Paired differences of two tuned models, per entry with the same questions about the same samples.

    Returns:
        `{entry: {metric: gain}}`, positive when better than the release; other entries are left out.
    """
    now, then = tuned_by_entry(predictions), tuned_by_entry(released)
    result = {}
    for entry in sorted(now.keys() & then.keys()):
        if _asked(now[entry]) == _asked(then[entry]):
            result[entry] = answers_of(now[entry]).gains_over(answers_of(then[entry]))
    return result


def tuned_by_entry(predictions: pa.Table) -> dict[str, list[dict[str, Any]]]:
    """The tuned model's rows, in the samples' order."""
    by_entry: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(predictions.to_pylist(), key=lambda row: row["row_index"]):
        if row["model"] == "tuned":
            by_entry.setdefault(row["entry"], []).append(row)
    return by_entry


def _asked(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["sample_id"], row["prompt"], row["reference"], row["label"]) for row in rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """The content of an `eval_metrics.json`, its directory, and the metrics' digest, their data version."""

    metrics: Mapping[str, Any]
    directory: Path
    digest: str

    @property
    def num_samples(self) -> int:
        """How many samples of all entries the models were asked."""
        return sum(scored["num_samples"] for scored in self.metrics["entries"].values())


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleasedPredictions:
    """What the current release answered when it was released."""

    version: str
    rows: pa.Table


def score_predictions(
    layout: Layout,
    recipe_name: str,
    train_answers: Sequence[str],
    predictions_dir: Path,
    predicted: Mapping[str, Any],
    *,
    released: ReleasedPredictions | None,
    measured: Mapping[str, Mapping[str, Any]],
) -> Scored:
    """Score a recipe's predictions against the base model, the most common answer and the current release.

    `predicted` has `weights_digest`, `data_version` and `data_digests` of the predictions, kept with the metrics, as is
    what else was `measured`, where it is not empty: `forgetting`, the result of `measure_forgetting`, and `benchmarks`.

    Raises:
        IntegrityError: The predictions are not complete.
    """
    rows = read_predictions(predictions_dir)
    metrics = compute_metrics(rows, train_answers) | {
        "release": released.version if released else None,
        "over_release": gains_over_release(rows, released.rows) if released else None,
        **{name: one for name, one in measured.items() if one},
    }
    inputs = {
        "weights_digest": predicted["weights_digest"],
        "predictions": predicted["data_version"],
        "predictions_path": layout.relative(predictions_dir),
        "data_digests": predicted["data_digests"],
    }
    directory = layout.metrics(recipe_name, digest_json([__version__, inputs, metrics])[:16])
    return Scored(metrics=metrics, directory=directory, digest=write_metrics(directory, metrics, inputs)["digest"])


def metric_rows(metrics: Mapping[str, Any], *, run_id: str, recipe: str, checkpoint_digest: str) -> pa.Table:
    """The rows of DuckDB's `eval_metrics`."""
    rows = [
        {"model": model, "entry": entry, "metric": metric, "value": value, "num_samples": scored["num_samples"]}
        for entry, scored in metrics["entries"].items()
        for model, values in scored["models"].items()
        for metric, value in values.items()
    ]
    return with_run(pa.Table.from_pylist(rows), run_id=run_id, recipe=recipe, checkpoint_digest=checkpoint_digest)


def write_metrics(target: Path, metrics: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Publish `eval_metrics.json` in `target` and return the manifest; `digest` in it is the data version.

    A sound `target` is kept unchanged. `inputs` are digests of predictions and checkpoint, for the manifest.
    """
    if not is_sound(target):
        with staged_directory(target) as staging:
            write_json_atomic(staging / METRICS_FILE, metrics)
            number = next_number(target.parent)
            write_manifest(staging, {"inputs": dict(inputs), "digest": digest_json(metrics), "number": number})
    return read_manifest(target)


def read_metrics(directory: Path) -> dict[str, Any]:
    """Read `eval_metrics.json` of a complete directory; raises IntegrityError if it is damaged."""
    require_sound(directory, "Materialise eval_metrics again.", only=[METRICS_FILE])
    return json.loads((directory / METRICS_FILE).read_text(encoding="utf-8"))
