"""A loaded model that answers and scores encoded rows in batches, in the turn format it was trained on.

Shape suffixes: B rows, T tokens, S supervised positions over all rows, V vocabulary.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn import functional
from transformers.generation.streamers import BaseStreamer

from mllm_assets.errors import DataError, MllmAssetsError
from mllm_assets.inference.naming import is_checkpoint
from mllm_assets.training.checkpoint_model import load_checkpoint, read_beginning
from mllm_assets.training.collate import Collator, ImageFeatures
from mllm_assets.training.encode import EncodedRow, Encoder
from mllm_assets.training.families import processor_family, require_template
from mllm_assets.training.model import load_model, load_processor, quiet_libraries
from mllm_assets.training.spec import CUTOFF_LEN, IMAGE_MAX_PIXELS, IMAGE_MIN_PIXELS

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model said; `num_tokens` without the token that ends the turn, `latency_s` its share of the batch."""

    text: str
    num_tokens: int
    latency_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn. Without `do_sample` the likeliest one is taken and the rest has no effect."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise MllmAssetsError(
                f"temperature must be above 0 and top_p in 0..1 (not 0), got {self.temperature} and {self.top_p}. "
                "For the likeliest answer leave sampling off."
            )


class Answerer:
    """Answers and scores rows with one model.

    Args:
        directory: A Hugging Face model directory, or a `checkpoint-<step>` of a run.
        device: Where the model runs.
        dtype: Of the weights; None keeps the directory's own.
        system: System text for rows without one of their own.
        cutoff_len: Most tokens of a scored row, as in training.
        image_max_pixels: Larger images are first shrunk to this area, as in training.
        image_min_pixels: Smaller ones are first enlarged to it.
        template: Turn format that the model was trained in; None for its family's usual one.
        enable_thinking: As in training. Reasoning is not part of an answer's text.

    Raises:
        ModelError: The directory holds no usable model.
        IntegrityError: A checkpoint is damaged, or does not fit the model that it was trained from.
        RecipeError: The template is of another family than the model.
    """

    def __init__(
        self,
        directory: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        system: str | None = None,
        cutoff_len: int = CUTOFF_LEN,
        image_max_pixels: int = IMAGE_MAX_PIXELS,
        image_min_pixels: int = IMAGE_MIN_PIXELS,
        template: str | None = None,
        enable_thinking: bool | None = True,
    ) -> None:
        quiet_libraries()
        is_delta = is_checkpoint(directory)
        processor = load_processor(read_beginning(directory).model_dir if is_delta else directory)
        if template is not None:
            require_template(template, processor_family(processor), str(directory))
        self.device = torch.device(device)
        model = load_checkpoint(directory) if is_delta else load_model(directory, dtype=dtype)
        self.model: Any = model.to(device=self.device, dtype=dtype if is_delta else None).eval()
        self.processor, self.tokenizer = processor, processor.tokenizer
        limits: dict[str, Any] = {"image_max_pixels": image_max_pixels, "image_min_pixels": image_min_pixels}
        self.encoder = Encoder(
            processor,
            cutoff_len=cutoff_len,
            system=system,
            template=template,
            enable_thinking=enable_thinking,
            **limits,
        )
        self.collator = Collator(processor, **limits)
        self._asked = Collator(processor, padding_side="left", select_logits=False, pad_to_multiple_of=1, **limits)
        self.stop_ids = self._find_stop_ids()
        # text models that count on no length, such as those without attention, do not have it
        self.context_len: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def room_for_answer(self, num_prompt_tokens: int) -> int:
        """Return how many tokens an answer may have, so that it and the prompt are within the model's context.

        Raises:
            DataError: None. Says how long the prompt is and how long it may be.
        """
        if self.context_len is None:
            return sys.maxsize
        if num_prompt_tokens >= self.context_len:
            raise DataError(
                f"The prompt has {num_prompt_tokens:,} tokens, its images included, and the model's context holds "
                f"{self.context_len:,} with the answer. Shorten the prompt, or give fewer images."
            )
        return self.context_len - num_prompt_tokens

    @torch.inference_mode()
    def losses(self, rows: Sequence[EncodedRow]) -> list[tuple[float, int]]:
        """Mean loss in nats over each row's supervised tokens, and their number.

        Raises:
            DataError: An image is damaged. Names row and file.
        """
        batch = self._to_device(self.collator(rows))
        keep_BT, labels_S = batch["logits_to_keep"], batch.pop("shift_labels")
        del batch["labels"]
        logits_SV = self.model(**batch, use_cache=False).logits.reshape(len(labels_S), -1)
        losses_S = functional.cross_entropy(logits_SV.float(), labels_S, reduction="none").double()
        counts = keep_BT.sum(dim=1).tolist()
        return [(float(row_S.mean()), count) for row_S, count in zip(losses_S.split(counts), counts, strict=True)]

    @torch.inference_mode()
    def answers(
        self,
        rows: Sequence[EncodedRow],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        streamer: BaseStreamer | None = None,
    ) -> list[Answer]:
        """Continue prompts (`Encoder.encode_prompt`) until the model ends its turn or `max_new_tokens` are said.

        A `streamer` is given the tokens of a single row as they come.

        Raises:
            DataError: An image is damaged. Names row and file.
        """
        sampling = sampling or Sampling()
        started = time.perf_counter()
        batch = self._to_device(self._asked(rows))
        del batch["labels"]
        options: dict[str, Any] = {"do_sample": sampling.do_sample, "max_new_tokens": max_new_tokens, "use_cache": True}
        if sampling.do_sample:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
        else:
            options |= {"temperature": None, "top_p": None, "top_k": None}
        output_BT = self.model.generate(
            **batch,
            **options,
            eos_token_id=self.stop_ids,
            pad_token_id=self._asked.pad_id,
            streamer=streamer,
        )
        said = [self._until_stop(row) for row in output_BT[:, batch["input_ids"].shape[1] :].tolist()]
        latency_s = (time.perf_counter() - started) / len(rows)
        return [
            Answer(
                text=self.tokenizer.decode(self._without_thought(ids), skip_special_tokens=True).strip(),
                num_tokens=len(ids),
                latency_s=latency_s,
            )
            for ids in said
        ]

    def answer_from(self, features: ImageFeatures) -> None:
        """Take images from here on from a cache; the model must have been made ready for it (`tower.install`)."""
        self.collator.features = self._asked.features = features

    def _find_stop_ids(self) -> list[int]:
        configured = self.model.generation_config.eos_token_id
        ids = set(configured if isinstance(configured, list) else [configured] if configured is not None else [])
        stop = self.encoder.template.stop
        ids |= set(self.tokenizer.encode(stop, add_special_tokens=False)) if stop else {self.tokenizer.eos_token_id}
        return sorted(ids)

    def _without_thought(self, ids: list[int]) -> list[int]:
        """Return what comes after the reasoning, all where there is none."""
        thought = self.encoder.template.thought
        closing = self.tokenizer.encode(thought[1].strip(), add_special_tokens=False) if thought else []
        ends = [
            end for end in range(len(closing), len(ids) + 1) if closing and ids[end - len(closing) : end] == closing
        ]
        return ids[ends[-1] :] if ends else ids

    def _until_stop(self, ids: list[int]) -> list[int]:
        end = next((index for index, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return ids[:end]

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
        if "pixel_values" in moved:
            moved["pixel_values"] = moved["pixel_values"].to(self.model.dtype)
        return moved


def in_batches(
    rows: Sequence[EncodedRow],
    batch_size: int,
    run: Callable[[Sequence[EncodedRow]], Sequence[T]],
    *,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[list[int], Sequence[T]]]:
    """Run batches of rows of like length, longest first, and yield each with the rows' positions.

    With `part` (index, count) every count-th batch only: the batches are the same however many parts there are, and so
    are the results, to the bit.

    Rows of like length need little padding; the longest first, so that a batch that does not fit in memory fails at
    once.
    """
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index].input_ids), index))
    for start in range(part[0] * batch_size, len(order), part[1] * batch_size):
        positions = order[start : start + batch_size]
        yield positions, run([rows[index] for index in positions])
