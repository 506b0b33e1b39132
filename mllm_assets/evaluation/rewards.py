"""What answers are worth while a model trains on rewards: metrics of the registry, each with its weight."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import DataError, RecipeError
from mllm_assets.evaluation.in_training import undisturbed
from mllm_assets.evaluation.samples import reference_of, spread
from mllm_assets.evaluation.scores import METRICS, Answers
from mllm_assets.families.family import TEMPLATES
from mllm_assets.inference.answerer import Answerer
from mllm_assets.training.caches.prepare import Setup
from mllm_assets.training.encoding.collate import ImageFeatures
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.kept_pixels import KeptPixels
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.loop import loss
from mllm_assets.training.loop.group_tuner import Rewarded
from mllm_assets.training.models.device import out_of_memory_is_an_error
from mllm_assets.worker.tasks import TrainTask

LABELS = "label_accuracy"
MOST_CHECKED = 1000  # rows of which it is seen before the first step that each metric has a value
CURE = "Lower per_device_train_batch_size (and raise gradient_accumulation_steps), or max_completion_length."


class RewardedAnswers:
    """Draws answers from the model that a task trains, and rewards them.

    `model` is without LoRA around it, and `features` are what its tower's output is read from, if it is.

    Raises:
        RecipeError: A metric cannot be computed of these rows.
        DataError: Two rows have the same id.
    """

    def __init__(self, task: TrainTask, setup: Setup, model: Any, features: ImageFeatures | None) -> None:
        self._spec, self._precision, self._device = setup.spec, setup.precision, setup.device
        digests = setup.inputs.digests
        dataset = Dataset(
            task.data_dir, media_dir=task.media_dir, read_part=None, digests=digests, rows_root=task.rows_root
        )
        self._weights: dict[str, float] = dict(setup.spec.reward or {})
        self._template = TEMPLATES[setup.spec.template]
        self._rows = _by_id(dataset, dict.fromkeys(setup.spec.train_entries))
        labels = {row.label for row in self._rows.values() if row.label is not None}
        self._labels = sorted(labels) if all(row.label is not None for row in self._rows.values()) else None
        rows = [*self._rows.values()]
        some = [rows[place] for place in spread(len(rows), MOST_CHECKED)]
        with undisturbed(self._device):
            self._scores([reference_of(row, self._template) for row in some], some)
        self._answerer = Answerer(setup.model_dir, setup.spec.turns, device=model.device, digests=digests, model=model)
        if features is not None:
            self._answerer.answer_from(features)
        self._answerer.asking_collator.keep_pixels(KeptPixels())
        self._refuse_without_room(setup.inputs.train_rows)
        self.never = self._answerer.never_drawn

    def describe(self) -> str:
        """What is rewarded, for the log."""
        parts = " + ".join(f"{weight:g} x {name}" for name, weight in self._weights.items())
        return (
            f"reward: {parts}, of {self._spec.num_generations} answers to each question, of at most "
            f"{self._spec.max_completion_length} tokens"
        )

    def draw(self, rows: Sequence[EncodedRow], seed: int) -> Sequence[Rewarded]:
        """`num_generations` answers to each row's question, those of the first row first."""
        asked = [self._rows[row.id] for row in rows for _ in range(self._spec.num_generations)]
        encoded = {row.id: self._answerer.encoder.encode_prompt(self._rows[row.id]) for row in rows}
        prompts = [encoded[row.id] for row in asked]
        model = self._answerer.model
        was_training = model.training
        with (
            undisturbed(self._device),
            loss.own_head(model),
            self._precision.context(self._device.kind),
            out_of_memory_is_an_error(f"drawing {len(prompts)} answers at once", CURE),
        ):
            model.eval()
            torch.manual_seed(seed)
            try:
                drawn = self._answerer.drawn(prompts, self._spec.max_completion_length, never=self.never)
            finally:
                model.train(was_training)
            scores = self._scores([answer.text for answer in drawn], asked)
        return [
            Rewarded(
                prompt=prompt,
                ids=answer.ids,
                ended=answer.ended,
                reward=float(sum(weight * scores[name][place] for name, weight in self._weights.items())),
                parts={name: float(values[place]) for name, values in scores.items()},
            )
            for place, (prompt, answer) in enumerate(zip(prompts, drawn, strict=True))
        ]

    def _refuse_without_room(self, rows: EncodedRows) -> None:
        """A question is asked whole, whatever `cutoff_len` is: it may leave no room for an answer."""
        context = self._answerer.context_len
        if context is None:
            return
        num_whole = rows.counted("num_tokens") + rows.counted("num_tokens_cut")
        for place in np.flatnonzero(num_whole >= context):
            row = self._rows[rows[int(place)].id]
            try:
                self._answerer.room_for_answer(len(self._answerer.encoder.encode_prompt(row).input_ids))
            except DataError as error:
                raise DataError(f"Row {row.id}: {error} Or take the row out.") from None

    def _scores(self, texts: Sequence[str], rows: Sequence[Row]) -> dict[str, np.ndarray]:
        references = [reference_of(row, self._template) for row in rows]
        unlabelled = Answers(answers=texts, references=references)
        given = unlabelled
        if self._labels is not None:
            given = replace(unlabelled, labels=[str(row.label) for row in rows], known_labels=self._labels)
        found = {}
        for name in self._weights:
            score = METRICS[name].score
            assert score is not None  # as each has that a recipe may name
            values = score(given)
            if values is None and given.labels:  # metrics of texts give none beside labels
                values = score(unlabelled)
            if values is None:
                raise RecipeError(self._why_not(name, references))
            found[name] = np.asarray(values, float)
            if found[name].shape != (len(texts),):
                said = f"{found[name].size} values for {len(texts)} answers"
                raise RecipeError(f"reward: {name} gave {said}: expected one for each. Correct the metric.")
            if not np.isfinite(found[name]).all():
                raise RecipeError(f"reward: {name} gave a value that is not a finite number. Correct the metric.")
        return found

    def _why_not(self, name: str, references: Sequence[str]) -> str:
        without = [row for row in self._rows.values() if row.label is None]
        if name == LABELS:
            why = f"{len(without):,} of {len(self._rows):,} rows have no label, the first is {without[0].id}"
        else:
            why = f"not all of its answers are of the kind that {name} compares, such as {references[0][:60]!r}"
        return (
            f"reward: {name} cannot be computed of {self._spec.dataset}: {why}. Take it out of the reward, or name an "
            "entry whose rows have it."
        )


def _by_id(dataset: Dataset, entries: Iterable[str]) -> dict[str, Row]:
    """The rows by their ids, by which a batch names them."""
    rows: dict[str, Row] = {}
    for name in entries:
        for row in dataset.entry(name).each():
            if rows.setdefault(row.id, row) != row:
                raise DataError(
                    f"Two rows of {', '.join(entries)} have the id {row.id}, by which stage: grpo finds a question's "
                    "reference. Give each row an id of its own."
                )
    return rows
