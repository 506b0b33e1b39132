"""The table of predictions: what the base and the tuned model give for each evaluation sample, and its gallery."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import torch

from mllm_assets.artifacts import is_complete, read_manifest, staged_directory, write_manifest
from mllm_assets.data.sharegpt import Row
from mllm_assets.data.tokens import IMAGE_PLACEHOLDER
from mllm_assets.evaluation.gallery import write_gallery
from mllm_assets.evaluation.measuring import Measured, Sample, load_samples, measure
from mllm_assets.evaluation.request import EvaluateRequest
from mllm_assets.evaluation.table import PREDICTIONS_FILE, predictions_digest, to_table
from mllm_assets.inference.naming import find_model
from mllm_assets.training.device import pick_device

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter


def evaluate_task(request: dict[str, Any], reporter: "Reporter") -> dict[str, Any]:
    """Worker entry: write `predictions.parquet` and the galleries, and return the manifest.

    Args:
        request: See `EvaluateRequest`. With `part` nothing is written: the result is what that part of the batches
            gave, by model. The request without it, with those results as `parts`, puts them together.
        reporter: Told after each batch.

    Raises:
        RecipeError: No such entry; names the nearest.
        DataError: A row cannot be used or an image is damaged. Names the row.
        ModelError: One of the models cannot be loaded.
        MachineError: The device asked for is not there.
    """
    spec = EvaluateRequest.parse(request)
    if is_complete(spec.directory):
        return read_manifest(spec.directory)
    if spec.num_threads:
        torch.set_num_threads(spec.num_threads)
    started = time.perf_counter()
    samples = load_samples(spec)
    device = pick_device(spec.device)
    directories = {"base": spec.base_model_dir, "tuned": spec.model_dir}
    models = {name: directories[name] for name in spec.models}
    if not spec.parts:
        measured = {name: measure(name, find_model(path), samples, spec, device, reporter)
                    for name, path in models.items()}  # fmt: skip
    else:
        measured = {name: Measured.together([part[name] for part in spec.parts]) for name in models}
    if spec.part:
        return {name: asdict(some) for name, some in measured.items()}
    table = to_table([row for name, some in measured.items() for row in rows_of(name, some, samples, spec.data_dir)])
    with staged_directory(spec.directory) as staging:
        pq.write_table(table, staging / PREDICTIONS_FILE)
        write_gallery(staging, table, data_dir=spec.data_dir, title=spec.recipe_name)
        payload = {
            "recipe": spec.recipe_name,
            "digest": predictions_digest(table),
            "entries": {entry: sum(s.entry == entry for s in samples) for entry in spec.entries},
            "num_predictions": len(table),
            "max_new_tokens": spec.max_new_tokens,
            "batch_size": spec.batch_size,
            "device": asdict(device),
            **({"num_answers_by_worker": _num_answers(spec.parts)} if spec.parts else {}),
            "wall_s": round(time.perf_counter() - started, 2),
        }
        return write_manifest(staging, payload)


def rows_of(model: str, measured: Measured, samples: Sequence[Sample], data_dir: Path) -> list[dict[str, Any]]:
    """Return the table's rows of one model, in the samples' order."""
    data_dir, rows = data_dir.resolve(), []
    for index, sample in enumerate(samples):
        loss_nats, num_supervised_tokens = measured.losses[str(index)]
        text, num_answer_tokens, latency_s = measured.answers[str(index)]
        shuffled = measured.shuffled_losses.get(str(index))
        rows.append(
            {
                **_question(model, sample, data_dir),
                "answer": text,
                "loss_nats": loss_nats,
                "loss_shuffled_nats": shuffled[0] if shuffled else None,
                "num_supervised_tokens": num_supervised_tokens,
                "num_answer_tokens": num_answer_tokens,
                "latency_s": latency_s,
            }
        )
    return rows


def _num_answers(parts: Sequence[dict[str, dict[str, Any]]]) -> list[int]:
    return [sum(len(measured["answers"]) for measured in part.values()) for part in parts]


def _question(model: str, sample: Sample, data_dir: Path) -> dict[str, Any]:
    """The columns that say who was asked what, and what would have been right."""
    return {
        "model": model,
        "entry": sample.entry,
        "sample_id": sample.row.id,
        "row_index": sample.index,
        "images": [path.resolve().relative_to(data_dir).as_posix() for path in sample.row.images],
        "prompt": _last(sample.row, "user").replace(IMAGE_PLACEHOLDER, "").strip(),
        "reference": _last(sample.row, "assistant"),
        "label": sample.row.label,
    }


def _last(row: Row, role: str) -> str:
    return next(message.content for message in reversed(row.messages) if message.role == role)
