"""Metrics of the base and the tuned model per entry, beside the answer that a model without eyes could give."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mllm_assets.artifacts import digest_json
from mllm_assets.errors import DataError, IntegrityError, ModelError
from mllm_assets.evaluation import scores
from mllm_assets.evaluation.intervals import paired_gain

MOST_COMMON = "most_common_answer"
_SAMPLE_METRICS = ("loss", "rouge_1", "rouge_2", "rouge_l", "cider_d", "exact_match", "label_accuracy")


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
    return {"entries": entries, "definitions": scores.definitions()}


def _entry_metrics(entry: str, rows: list[dict[str, Any]], most_common: str) -> dict[str, Any]:
    by_model = _rows_by_model(entry, rows)
    first = next(iter(by_model.values()))
    references = [row["reference"] for row in first]
    labels = labels_of(first)

    models: dict[str, dict[str, float]] = {}
    samples = {model: per_sample(model_rows, references, labels) for model, model_rows in by_model.items()}
    for model, model_rows in by_model.items():
        corpus = scores.corpus_scores([row["answer"] for row in model_rows], references)
        models[model] = {**_means(samples[model]), **corpus, **_losses(model_rows)}
    constant = [most_common] * len(references)
    samples[MOST_COMMON] = _text_samples(constant, references, labels)
    models[MOST_COMMON] = {**scores.corpus_scores(constant, references), **_means(samples[MOST_COMMON])}

    result = {
        "num_samples": len(first),
        "samples_digest": digest_json([[row["sample_id"], row["reference"]] for row in first]),
        "primary": "label_accuracy" if labels else "rouge_l",
        "most_common_answer": most_common,
        "models": models,
        "gains": _gains(samples, by_model, constant)
        | {f"{m}_over_shuffled_images": _image_gain(r) for m, r in by_model.items()},
    }
    if labels:
        result["confusion"] = {m: confusion(r, labels) for m, r in by_model.items()}
    return result


def sample_metrics(predictions: pa.Table) -> list[dict[str, float]]:
    """Each row's own metrics by name, in the table's order; corpus metrics (BLEU, chrF) have none."""
    rows = predictions.to_pylist()
    result: list[dict[str, float]] = [{} for _ in rows]
    positions: dict[tuple[str, str], list[int]] = {}
    for position, row in enumerate(rows):
        positions.setdefault((row["entry"], row["model"]), []).append(position)
    for group in positions.values():
        some = [rows[position] for position in group]
        references = [row["reference"] for row in some]
        scored = _text_samples([row["answer"] for row in some], references, labels_of(some))
        for metric, values in scored.items():
            for position, value in zip(group, values, strict=True):
                result[position][metric] = float(value)
    return result


def labels_of(rows: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The true label of each row, None unless all have one."""
    labels = [row["label"] for row in rows]
    return None if None in labels else labels


def _rows_by_model(entry: str, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["model"], row["row_index"])):
        if not math.isfinite(row["loss_nats"]) or not math.isfinite(row["loss_shuffled_nats"] or 0.0):
            raise ModelError(
                f"The {row['model']} model's loss on sample {row['sample_id']} of {entry} is not a finite number. "
                "Train again with a lower learning_rate, or in bf16 in place of fp16."
            )
        by_model.setdefault(row["model"], []).append(row)
    asked = {model: [(row["row_index"], row["sample_id"]) for row in r] for model, r in by_model.items()}
    if len({tuple(a) for a in asked.values()}) > 1:
        sizes = ", ".join(f"{model} {len(a)}" for model, a in asked.items())
        raise IntegrityError(
            f"The models were asked different samples of {entry} ({sizes}). Materialise the predictions again."
        )
    return by_model


def per_sample(
    rows: Sequence[Mapping[str, Any]], references: Sequence[str], labels: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """Each metric's value for each row of one model."""
    losses = np.array([row["loss_nats"] for row in rows])
    return {**_text_samples([row["answer"] for row in rows], references, labels), "loss": losses}


def _text_samples(
    answers: Sequence[str], references: Sequence[str], labels: Sequence[str] | None
) -> dict[str, np.ndarray]:
    result = {
        **scores.rouge_scores(answers, references),
        "cider_d": scores.cider_d_scores(answers, references),
        "exact_match": scores.exact_matches(answers, references),
    }
    if labels:
        known = sorted(set(labels))
        named = [scores.find_label(answer, known) for answer in answers]
        result["label_accuracy"] = np.array([float(a == b) for a, b in zip(named, labels, strict=True)])
    return result


def _means(samples: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in samples.items()}


def _losses(rows: list[dict[str, Any]]) -> dict[str, float]:
    loss = _token_mean(rows, "loss_nats")
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # exp overflows a double above 709
    shuffled = [row for row in rows if row["loss_shuffled_nats"] is not None]
    return result | ({"loss_shuffled": _token_mean(shuffled, "loss_shuffled_nats")} if shuffled else {})


def _token_mean(rows: list[dict[str, Any]], column: str) -> float:
    weights = [row["num_supervised_tokens"] for row in rows]
    return float(np.average([row[column] for row in rows], weights=weights))


def _gains(
    samples: Mapping[str, Mapping[str, np.ndarray]],
    by_model: Mapping[str, list[dict[str, Any]]],
    constant: Sequence[str],
) -> dict[str, dict[str, Any]]:
    if "tuned" not in samples:
        return {}
    said = {model: [row["answer"] for row in rows] for model, rows in by_model.items()} | {MOST_COMMON: constant}
    references = [row["reference"] for row in by_model["tuned"]]
    return {
        f"tuned_over_{other}": gain_over(samples["tuned"], samples[other])
        | scores.corpus_gains(said["tuned"], said[other], references)
        for other in ("base", MOST_COMMON)
        if other in samples
    }


def gain_over(tuned: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Paired differences of the metrics that both have; a lower loss counts as a gain."""
    shared = [metric for metric in _SAMPLE_METRICS if metric in tuned and metric in other]
    return {m: paired_gain((tuned[m] - other[m]) * (-1 if m == "loss" else 1)) for m in shared}


def _image_gain(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How much lower the loss is with the sample's own images than with another's."""
    pairs = [(r["loss_shuffled_nats"], r["loss_nats"]) for r in rows if r["loss_shuffled_nats"] is not None]
    return {"loss": paired_gain(np.array([shuffled - true for shuffled, true in pairs]))} if pairs else {}


def confusion(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """Count true labels (rows) against named ones (columns; the last two are "(none)" and "(several)")."""
    known = sorted(set(labels))
    columns = [*known, scores.NO_LABEL, scores.SEVERAL_LABELS]
    counts = [[0] * len(columns) for _ in known]
    for row, label in zip(rows, labels, strict=True):
        counts[known.index(label)][columns.index(scores.find_label(row["answer"], known))] += 1
    return {"labels": known, "named": columns, "counts": counts}
