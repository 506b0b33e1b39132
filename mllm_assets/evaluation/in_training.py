"""Metrics of a model's answers while it trains: to some rows of the evaluation entries, greedily, at each evaluation.

The model is the one that trains, with what is cached instead of its tower. Nothing of the training notices: random
states, the mode of the modules and the output layer are afterwards what they were before.
"""

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import RecipeError
from mllm_assets.evaluation.samples import EntrySamples, good_rows, reference_of, spread
from mllm_assets.evaluation.scores import Answers
from mllm_assets.families.family import TEMPLATES
from mllm_assets.inference.answerer import Answerer
from mllm_assets.inference.batches import Batch, Pass, in_batches
from mllm_assets.recipe.asking import Sampling
from mllm_assets.training.caches.prepare import Setup
from mllm_assets.training.encoding.collate import ImageFeatures
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.kept_pixels import KeptPixels
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.loop import loss
from mllm_assets.training.models.device import Device
from mllm_assets.worker.protocol import num_ranks, rank
from mllm_assets.worker.tasks import ROWS_AT_ONCE, Part, TrainTask


class AnswersInTraining:
    """Asks the model that a task trains.

    `model` is without LoRA around it, and `features` are what its tower's output is read from, if it is.

    Raises:
        RecipeError: A metric cannot be computed of these rows.
    """

    def __init__(self, task: TrainTask, setup: Setup, model: Any, features: ImageFeatures | None) -> None:
        self._names, self._device, self._precision = setup.measured, setup.device, setup.precision
        self._entries = task.recipe.eval_dataset
        self._sampling = Sampling(max_new_tokens=task.answers.max_new_tokens, do_sample=False)
        digests = setup.inputs.digests
        dataset = Dataset(
            task.data_dir, media_dir=task.media_dir, read_part=None, digests=digests, rows_root=task.rows_root
        )
        rows = sampled_rows(dataset, task)
        template = TEMPLATES[task.recipe.template]
        references = [reference_of(row, template) for row in rows]
        labels = [row.label for row in rows if row.label is not None]
        self._right = Answers(
            answers=references, references=references, labels=labels if len(labels) == len(rows) else None
        )
        with undisturbed(self._device):
            missing = [name for name in self._names if self._right.total(name) is None]
        if missing:
            raise RecipeError(
                f"{' and '.join(missing)} cannot be measured on {task.recipe.eval_dataset}: rows without a label, or "
                "answers of another kind. Set metric_for_best_model, or the sweep's objective, to another metric, such "
                "as exact_match."
            )
        self._answerer = Answerer(setup.model_dir, task.recipe.turns, device=model.device, digests=digests, model=model)
        if features is not None:
            self._answerer.answer_from(features)
        self._answerer.asking_collator.keep_pixels(KeptPixels())
        encoder = self._answerer.encoder
        prompts = EncodedRows.of(map(encoder.encode_prompt, rows), encoder.image_token_id, dataset.folder)
        self._asked = Pass(
            name="answers",
            rows=prompts,
            collator=self._answerer.asking_collator,
            run=self._answers,
            size=ROWS_AT_ONCE,
        )

    def describe(self) -> str:
        """What is measured, for the log."""
        how = f"{len(self._asked.rows)} rows of {self._entries}, at most {self._sampling.max_new_tokens} tokens each"
        return f"answers: {', '.join(self._names)} at each evaluation, on {how}"

    def measure(self) -> dict[str, float]:
        """Metrics of the model's answers now, by name. Each process asks about its share of the rows."""
        model = self._answerer.model
        was_training = model.training
        with (
            undisturbed(self._device),
            loss.own_head(model),
            self._precision.context(self._device.kind),
        ):
            model.eval()
            try:
                found = self._found()
            finally:
                model.train(was_training)
            given = replace(self._right, answers=[found[number] for number in range(len(found))])
            return {name: float(given.total(name) or 0.0) for name in self._names}

    def _found(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for _, positions, texts in in_batches([self._asked], part=Part(index=rank(), count=num_ranks())):
            found |= zip(positions, texts, strict=True)
        if num_ranks() > 1:
            found = {number: text for some in gather_object([found]) for number, text in some.items()}
        return found

    def _answers(self, rows: Sequence[EncodedRow], batch: Batch | None) -> list[str]:
        return [answer.text for answer in self._answerer.answers(rows, self._sampling, batch=batch)]


def sampled_rows(dataset: Dataset, task: TrainTask) -> list[Row]:
    """The rows of the evaluation entries that are asked about, spread evenly over all that are evaluated."""
    entries = [dataset.entry(name) for name in task.recipe.eval_entries]
    usable = [good_rows(entry) for entry in entries]
    if (limit := task.recipe.max_samples) is not None:
        usable = [indices[: bisect_left(indices, limit)] for indices in usable]
    numbers = spread(sum(map(len, usable)), task.answers.max_samples)
    rows: list[Row] = []
    first = 0
    for entry, indices in zip(entries, usable, strict=True):
        chosen = [indices[number - first] for number in numbers if first <= number < first + len(indices)]
        rows += [parse() for parse in EntrySamples(entry, chosen).unparsed()]
        first += len(indices)
    return rows


@contextmanager
def undisturbed(device: Device) -> Iterator[None]:
    """Put all random states back afterwards: a loader draws from PyTorch's, and a metric may draw from any."""
    python, arrays = random.getstate(), np.random.get_state()
    cards = [torch.cuda.current_device()] if device.kind == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cards):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
