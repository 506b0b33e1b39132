"""The table of predictions: what the base and the tuned model give for each evaluation sample, and its gallery."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import torch

from mllm_assets.artifacts import digest_json, is_sound, read_manifest, staged_directory, write_manifest
from mllm_assets.data.sharegpt.conversation import ASKING, without_placeholders
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.answered import AnsweredRows, folder_of, forget
from mllm_assets.evaluation.backend import backend_of
from mllm_assets.evaluation.forgetting import UNRELATED_FILE
from mllm_assets.evaluation.gallery import write_gallery
from mllm_assets.evaluation.in_turn import InTurn
from mllm_assets.evaluation.samples import EncodedSamples, Samples, load_samples, reference_of
from mllm_assets.evaluation.table import PREDICTIONS_FILE, predictions_digest, to_table
from mllm_assets.families.family import TEMPLATES
from mllm_assets.file_digests import FileDigests
from mllm_assets.inference.answerer import Answerer, use_cached_images
from mllm_assets.inference.batch_size import rows_at_once
from mllm_assets.inference.batches import Batch, Pass, in_batches
from mllm_assets.training.encoding.kept_pixels import KeptPixels
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.models import value_head
from mllm_assets.training.models.device import Device, pick_device
from mllm_assets.training.models.load import weights_digest
from mllm_assets.training.runs.models import checkpoint_digest, find_model, is_checkpoint, model_fingerprint
from mllm_assets.worker.tasks import ROWS_AT_ONCE, WHOLE, EvaluateTask, Evaluation, EvaluationSettings, Measured

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter


ANSWERS = "answers"  # a pass
PREFERRED, REJECTED = "preferred", "rejected"  # in place of an answer that is one of a pair


def evaluate_task(task: EvaluateTask, reporter: "Reporter") -> Evaluation:
    """Worker entry: write `predictions.parquet` and the galleries.

    Raises:
        RecipeError: No such entry; names the nearest.
        DataError: A row cannot be used or an image is damaged. Names the row.
        ModelError: One of the models cannot be loaded.
        MachineError: The machine does not have the wanted device.
    """
    if is_sound(task.directory):
        return Evaluation(manifest=read_manifest(task.directory), measured={})
    if task.accelerator.num_threads:
        torch.set_num_threads(task.accelerator.num_threads)
    started = time.perf_counter()
    read_part = None if task.parts else WHOLE
    dataset = Dataset(task.data_dir, media_dir=task.media_dir, read_part=read_part, rows_root=task.rows_root)
    samples = load_samples(task, dataset)
    device = pick_device(task.accelerator.device, warn=reporter.warn)
    directories = {"base": task.base_model_dir, "tuned": task.model_dir}
    models = InTurn(task.recipe.turns, device, dataset.digests)
    measured = {
        name: merge([part.measured[name] for part in task.parts])
        if task.parts
        else measure(models, name, find_model(directories[name]), samples, task, device, reporter)
        for name in task.models
    }
    dataset.digests.require_unchanged()
    if task.part:
        return Evaluation(manifest={}, measured=measured)
    answered_by = {key: text for some in measured.values() for key, text in some.answered_by.items()}
    num_answers = [sum(len(some.answers) for some in part.measured.values()) for part in task.parts]
    rows = [row for name, some in measured.items() for row in rows_of(name, some, samples, task)]
    own = [row for row in rows if row["entry"] in task.entries]
    table = to_table(own, of_pairs=task.recipe.learns_scores)
    unrelated = to_table([row for row in rows if row["entry"] not in task.entries])
    with staged_directory(task.directory) as staging:
        pq.write_table(table, staging / PREDICTIONS_FILE)
        if len(unrelated):
            pq.write_table(unrelated, staging / UNRELATED_FILE)
        write_gallery(staging, table, data_dir=task.data_dir, title=task.recipe_name)
        payload = {
            "recipe": task.recipe_name,
            "digest": predictions_digest(table, unrelated),
            "entries": {some.entry.name: len(some) for some in samples.entries if some.entry.name in task.entries},
            "num_predictions": len(table),
            "max_new_tokens": task.settings.max_new_tokens,
            "batch_sizes": {name: some.batch_sizes for name, some in measured.items()},
            "device": asdict(device),
            **({"answered_by": answered_by} if answered_by else {}),
            **({"num_answers_by_worker": num_answers} if task.parts else {}),
            "wall_s": round(time.perf_counter() - started, 2),
        }
        dataset.digests.require_unchanged()  # the gallery shows the images
        manifest = write_manifest(staging, payload)
    forget(task.directory)
    return Evaluation(manifest=manifest, measured={}, model_files=dataset.digests.states(task.model_dir))


def merge(parts: Sequence[Measured]) -> Measured:
    """Join what the parts of one evaluation gave."""
    joined: dict[str, dict[str, Any]] = {
        field.name: {key: value for part in parts for key, value in getattr(part, field.name).items()}
        for field in fields(Measured)
    }
    sizes = [some for part in parts for some in part.batch_sizes.items()]
    smallest = {name: min(size for other, size in sizes if other == name) for name in joined.pop("batch_sizes")}
    return Measured(**joined, batch_sizes=smallest)


def rows_of(model: str, measured: Measured, samples: Samples, task: EvaluateTask) -> list[dict[str, Any]]:
    """Return the table's rows of one model, in the samples' order."""
    data_dir, template, rows = task.data_dir.resolve(), TEMPLATES[task.recipe.template], []
    for number, (entry, index, row) in enumerate(samples):
        loss_nats, num_supervised_tokens = measured.losses[str(number)]
        text, num_answer_tokens, latency_s = measured.answers[str(number)]
        if row.rejected is not None and task.recipe.learns_scores:
            text = row.rejected.content if text == REJECTED else reference_of(row, template)
        shuffled = measured.shuffled_losses.get(str(number))
        rows.append(
            {
                "model": model,
                "entry": entry,
                "sample_id": row.id,
                "row_index": index,
                "images": [os.path.relpath(path.resolve(), data_dir) for path in row.images],
                "prompt": without_placeholders(_question(row)),
                "reference": reference_of(row, template),
                "label": row.label,
                "answer": text,
                "loss_nats": loss_nats,
                "loss_shuffled_nats": shuffled[0] if shuffled else None,
                "num_supervised_tokens": num_supervised_tokens,
                "num_answer_tokens": num_answer_tokens,
                "latency_s": latency_s,
            }
        )
    return rows


def _question(row: Row) -> str:
    return next(message.content for message in reversed(row.messages) if message.role in ASKING)


def require_named_model(directory: Path, expected: str, digests: FileDigests) -> None:
    """Refuse a model that is not the one by which its predictions are named; `digests` remembers its files.

    Raises:
        IntegrityError: It is not. Names the directory, or the file where a manifest speaks for it.
    """
    if is_checkpoint(directory):
        found = [checkpoint_digest(directory)]  # its files are compared when they are loaded
    else:
        found = [model_fingerprint(directory, digests), weights_digest(directory, digests.of)]
    if expected not in found:
        raise IntegrityError(
            f"The model in {directory} is not the one by which these predictions are named: expected digest "
            f"{expected[:12]}, found {found[0][:12]}. Materialise the asset that makes the model, then this one again."
        )


def measure(
    models: InTurn,
    model: str,
    directory: Path,
    samples: Samples,
    task: EvaluateTask,
    device: Device,
    reporter: "Reporter",
) -> Measured:
    """Score and answer every sample with one model, or those in the batches of `task.part`."""
    settings, digests = task.settings, models.digests
    models.announce(directory)
    require_named_model(directory, task.model_digests[model], digests)
    answerer = models.load(directory)
    if task.recipe.learns_scores:
        value_head.load(answerer.model, directory)

    asked = samples.encoded(answerer.encoder, task.rows_root, reporter)
    backend = backend_of(task, model, answerer, samples)
    if task.features_root is not None and answerer.collator.features is None:
        use_cached_images(answerer, asked.prompts, task.features_root, task.recipe, device, reporter, digests)
    kept_pixels = KeptPixels()
    answerer.collator.keep_pixels(kept_pixels)
    answerer.asking_collator.keep_pixels(kept_pixels)
    part = task.part or WHOLE
    passes = _passes(answerer, asked, settings, device, of_pairs=task.recipe.learns_scores)
    kept = AnsweredRows(folder_of(task, device), model, part, {n: len(p.rows) for n, p in passes.items()})
    found: dict[str, dict[int, tuple[Any, ...]]] = {}
    for name, one in passes.items():
        one.known = kept.known[name]
        found[name] = one.known_of(part)
    progress = _Progress(
        reporter,
        f"evaluate {model} model",
        total=sum(len(one.positions(part)) for one in passes.values()),
        num_known=sum(map(len, found.values())),
    )
    batches = in_batches(
        [one for one in passes.values() if backend is None or one.name != ANSWERS],
        part=part,
        num_workers=0 if answerer.collator.features is not None else task.recipe.dataloader_num_workers,
        pixels=answerer.model.dtype,
        pin_memory=device.kind == "cuda",
        reporter=reporter,
    )
    for one, positions, values in chain(batches, backend.asked(passes[ANSWERS], part) if backend else ()):
        kept.add(one.name, positions, values)
        found[one.name] |= zip(positions, values, strict=True)
        progress.add(len(positions))
    if task.recipe.learns_scores:
        found["answers"] = {index: _preferred(loss) for index, (loss, _) in found["losses"].items()}
    return Measured(
        losses={str(index): value for index, value in found["losses"].items()},
        shuffled_losses={str(asked.paired[i]): value for i, value in found["shuffled_losses"].items()},
        answers={str(index): value for index, value in found["answers"].items()},
        batch_sizes={one.name: one.size for one in passes.values() if one.rows},
        answered_by={model: backend.said} if backend else {},
    )


def _passes(
    answerer: Answerer,
    asked: EncodedSamples,
    settings: EvaluationSettings,
    device: Device,
    *,
    of_pairs: bool,
) -> dict[str, Pass]:
    """What is asked, by the names of `Measured`; of pairs no answer, since the loss says which is preferred."""

    def answer(rows: Sequence[EncodedRow], batch: Batch | None) -> Sequence[Any]:
        # a seed for each batch: the same answers however many workers share the batches
        seed = int(digest_json([settings.seed, [row.id for row in rows]])[:12], 16)
        return [astuple(answer) for answer in answerer.answers(rows, settings.sampling(seed), batch=batch)]

    def score(rows: Sequence[EncodedRow], batch: Batch | None) -> Sequence[Any]:
        return (answerer.pair_losses if of_pairs else answerer.losses)(rows, batch=batch)

    unit = settings.batch_size or ROWS_AT_ONCE
    scored = answered = unit
    if settings.batch_size is None:
        scored = rows_at_once(answerer, asked.own + asked.swapped, device)
        if not settings.do_sample:
            answered = rows_at_once(answerer, asked.prompts, device, num_new_tokens=settings.max_new_tokens)
    score_how = {"collator": answerer.collator, "run": score, "size": scored, "unit": unit}
    ask_how = {"collator": answerer.asking_collator, "run": answer, "size": answered, "unit": unit}
    scored_passes = {
        "losses": Pass(name="losses", rows=asked.own, **score_how),
        "shuffled_losses": Pass(name="shuffled_losses", rows=asked.swapped, **score_how),
    }
    if of_pairs:
        return scored_passes
    return scored_passes | {
        "answers": Pass(name="answers", rows=asked.prompts, is_divisible=not settings.do_sample, **ask_how),
    }


def _preferred(loss_nats: float) -> tuple[str, int, float]:
    """Which answer of a pair a model prefers, as `Measured.answers` has an answer."""
    return PREFERRED if loss_nats < math.log(2) else REJECTED, 0, 0.0


class _Progress:
    """Counts finished rows over several passes; some are known from an earlier start."""

    def __init__(self, reporter: "Reporter", stage: str, *, total: int, num_known: int) -> None:
        self._reporter, self._stage, self._total, self._known, self._done = reporter, stage, total, num_known, 0
        self._started = time.perf_counter()
        if num_known:
            reporter.progress(stage, num_known, total)

    def add(self, num_rows: int) -> None:
        """Report that more rows are finished."""
        self._done += num_rows
        rows_per_s = self._done / max(time.perf_counter() - self._started, 1e-9)
        self._reporter.progress(self._stage, self._known + self._done, self._total, rows_per_s=round(rows_per_s, 1))
