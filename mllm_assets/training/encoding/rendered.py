"""Rows of a model of a family that is not described here: its own chat template and processor make all of a batch.

What is learnt is found by rendering the conversation up to each answer, and up to behind it: the text in between, in
tokens. So it works for any template that writes a conversation from its beginning on, and refuses the rows of others.
Pictures are processed when a row is encoded, and again for each batch: nothing is cached.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import transformers

from mllm_assets import __version__
from mllm_assets.data.sharegpt.conversation import ANSWERING, FUNCTION, IMAGE_PLACEHOLDER, OBSERVATION
from mllm_assets.errors import DataError, IntegrityError, ModelError
from mllm_assets.families.family import TEMPLATES, processor_family
from mllm_assets.families.image_slots import AsTheyAre
from mllm_assets.families.turn_format import AUTO
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.training.encoding.collate import Collator, Padding
from mllm_assets.training.encoding.encode import Encoder
from mllm_assets.training.encoding.image_files import load_image
from mllm_assets.training.encoding.row import IGNORE_INDEX, EncodedRow
from mllm_assets.training.encoding.turns import control_token_pattern
from mllm_assets.training.encoding.visual_tokens import image_token_id, refuse_videos

if TYPE_CHECKING:
    from mllm_assets.data.sharegpt.rows import Message, Row


PADDING = Padding()


@dataclass(frozen=True, slots=True)
class RenderedTurns:
    """What a program that asks needs of the turns: the system text, and the tokens that a text must not hold."""

    system: str | None
    control_token: Any
    enable_thinking: bool | None = None


class RenderedEncoder(Encoder):
    """Encodes rows as the model's chat template and processor write them; questions are supervised as an option.

    Args:
        processor: The model's, as `load_processor` returns it.
        settings: The system text, and limits.
        train_on_prompt: Questions are supervised as well.
        mask_history: Only the last answer is supervised.
        preserve_thinking: Without effect: what becomes of reasoning is the chat template's.
        num_embeddings: Rows of the model's embedding.

    Raises:
        ModelError: The model has no chat template.
    """

    def __init__(
        self,
        processor: Any,
        settings: TurnSettings = TurnSettings(),
        *,
        train_on_prompt: bool = False,
        mask_history: bool = False,
        preserve_thinking: bool = False,
        num_embeddings: int | None = None,
    ) -> None:
        if not processor.chat_template:
            raise ModelError(
                f"The model in {processor.directory} has no chat template, which template: {AUTO} writes turns with. "
                "Copy chat_template.jinja of an instruct model of its family into it."
            )
        self.cutoff_len = settings.cutoff_len
        self.template = TEMPLATES[AUTO]
        self.image_token_id = image_token_id(processor)
        self.turns = RenderedTurns(settings.system, control_token_pattern(processor.tokenizer))
        self.train_on_prompt, self.mask_history = train_on_prompt, mask_history
        self._processor, self._tokenizer, self._num_embeddings = processor, processor.tokenizer, num_embeddings
        self._image_limits = {"max_pixels": settings.image_max_pixels, "min_pixels": settings.image_min_pixels}
        self._visual_ids = {self.image_token_id}
        self._lacks_embeddings = self._has_beyond(processor.tokenizer)

    @property
    def sees_sizes(self) -> bool:
        return True

    def describe(self) -> dict[str, Any]:
        return {
            "processor": self._processor.describe(),
            "turns": [self.turns.system, self._image_limits, self.cutoff_len, self._num_embeddings],
            "labels": [self.train_on_prompt, self.mask_history],
            "versions": [__version__, tokenizers.__version__, transformers.__version__],
        }

    def encode(self, row: "Row") -> EncodedRow:
        """Encode all turns of a row, answers supervised.

        Raises:
            DataError: It is longer than `cutoff_len`, holds control tokens, or the template does not write it from its
                beginning on. Names the row.
        """
        if row.mark is False:
            raise DataError(f"Row {row.id} is marked as a bad answer (kto_tag: false), and would be learnt. Drop it.")
        messages = self._messages(row)
        text = self._rendered(row, messages)
        encoded = self._encoded(row, text)
        learnt = [number for number, message in enumerate(messages) if message.role in ANSWERING]
        labels = array("i", encoded.input_ids if self.train_on_prompt else [IGNORE_INDEX] * len(encoded.input_ids))
        for number in learnt[-1:] if self.mask_history else learnt:
            begin = self._place(row, messages[:number], encoded, asks=True)
            end = self._place(row, messages[: number + 1], encoded)
            labels[begin:end] = encoded.input_ids[begin:end]
        if labels.count(IGNORE_INDEX) == len(labels):
            raise DataError(f"Row {row.id} supervises no token: its answers are empty. Drop the row.")
        return replace(encoded, labels=labels)

    def encode_prompt(self, row: "Row") -> EncodedRow:
        """Encode what precedes a row's last answer, as the template asks for it; all labels are -100."""
        messages = self._messages(row)
        if messages[-1].role in ANSWERING:
            messages = messages[:-1]
        return self._encoded(row, self._rendered(row, messages, asks=True), limit=None)

    def _messages(self, row: "Row") -> "Sequence[Message]":
        messages = row.messages
        if row.videos:
            refuse_videos(row, self._processor)
        if row.tools or any(message.role in (FUNCTION, OBSERVATION) for message in messages):
            raise DataError(
                f"Row {row.id} has tools, which template: {AUTO} does not write. Train a model of a described family "
                "on it, or drop the row."
            )
        if self.turns.system and messages[0].role != "system":
            messages = (replace(messages[0], role="system", content=self.turns.system), *messages)
        for number, message in enumerate(messages):
            for part in message.content.split(IMAGE_PLACEHOLDER):
                if found := self.turns.control_token.search(part):
                    raise DataError(
                        f"Row {row.id}: message {number} holds {found.group()!r}, which steers the model and would be "
                        "read as that, not as text. Take it out, or drop the row."
                    )
        return messages

    def _rendered(self, row: "Row", messages: "Sequence[Message]", *, asks: bool = False) -> str:
        chat = [{"role": message.role, "content": _parts(message.content)} for message in messages]
        try:
            return self._processor.whole.apply_chat_template(chat, add_generation_prompt=asks, tokenize=False)
        except Exception as error:  # a template is a program of somebody else's
            raise DataError(
                f"The model's chat template cannot write row {row.id} ({type(error).__name__}: {str(error)[:200]}). "
                "Drop the row, or write its turns as the template wants them."
            ) from error

    def _encoded(self, row: "Row", text: str, limit: int | None = 0) -> EncodedRow:
        images = [load_image(path, row_id=row.id, **self._image_limits, slots=None) for path in row.images]
        ids = array("i", self._processor.batch([text], [images], row.id)["input_ids"][0].tolist())
        if limit is not None and len(ids) > self.cutoff_len:
            raise DataError(
                f"Row {row.id} has {len(ids)} tokens, more than cutoff_len {self.cutoff_len}; with template: {AUTO} "
                f"rows are not cut. Set cutoff_len: {len(ids)} or more, or drop the row."
            )
        ignored = array("i", [IGNORE_INDEX]) * len(ids)
        encoded = EncodedRow(id=row.id, input_ids=ids, labels=ignored, images=tuple(row.images), text=text)
        self._require_embedded(encoded)
        return encoded

    def _place(self, row: "Row", messages: "Sequence[Message]", whole: EncodedRow, *, asks: bool = False) -> int:
        """How many tokens the conversation up to here has, which must be the first ones of the whole."""
        text = self._rendered(row, messages, asks=asks)
        if text == whole.text:
            return len(whole.input_ids)
        num_images = sum(message.content.count(IMAGE_PLACEHOLDER) for message in messages)
        part = replace_images(row, num_images)
        ids = self._encoded(part, text, limit=None).input_ids
        if not whole.text.startswith(text) or whole.input_ids[: len(ids)] != ids:
            raise DataError(
                f"Row {row.id}: the model's chat template writes the first {len(messages)} messages otherwise when "
                "others follow, so that nobody can say which tokens are the answer. mask_history: true learns the last "
                "answer only; or drop the row."
            )
        return len(ids)


class RenderedCollator(Collator):
    """Batches of rendered rows, all of them as the model's processor makes them.

    Args:
        processor: The model's.
        settings: Limits of an image's area.
        padding: How rows become equally long.
        select_logits: Without effect: not every model computes some logits only.
        separate_packed_rows: Without effect: rows are not packed.
    """

    def __init__(
        self,
        processor: Any,
        settings: TurnSettings = TurnSettings(),
        *,
        padding: Padding = PADDING,
        select_logits: bool = True,
        separate_packed_rows: bool = False,
    ) -> None:
        self.family, self._processor = processor.family, processor
        self.image_processor = processor.image_processor
        self.slots = AsTheyAre()
        tokenizer = processor.tokenizer
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.image_token_id = image_token_id(processor)
        self.image_limits = {"max_pixels": settings.image_max_pixels, "min_pixels": settings.image_min_pixels}
        self.padding, self.select_logits = padding, False
        self.features = self.hidden_states = self.note_row = self.digests = self._kept = None
        self.separate_packed_rows = self.selects_by_mask = False

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        """Collate at least one row: what the processor returns, and labels_BT, -100 where nothing is learnt.

        Raises:
            DataError: An image is damaged, or the processor does not take these rows together. Names the rows.
            IntegrityError: It gives other tokens than when the rows were encoded.
        """
        names = ", ".join(row.id for row in rows)
        images = [[self._opened(path, row.id) for path in row.images] for row in rows]
        if self.digests is not None:
            self.digests.require_unchanged(path for row in rows for path in row.images)
        batch = self._processor.batch([row.text for row in rows], images, names, side=self.padding.side)
        input_ids_BT = batch["input_ids"]
        length = input_ids_BT.shape[1]
        expected_BT = self._pad([row.input_ids for row in rows], length, self.pad_id)
        seen_BT = self._pad([array("i", [1]) * len(row.input_ids) for row in rows], length, 0)
        if not torch.equal(input_ids_BT * seen_BT, expected_BT * seen_BT):
            raise IntegrityError(
                f"The model's processor gives other tokens for rows {names} together than for each alone. Set "
                "per_device_train_batch_size, per_device_eval_batch_size and the evaluation's batch_size to 1."
            )
        return {**batch, "labels": self._pad([row.labels for row in rows], length, IGNORE_INDEX)}

    def tower_inputs(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        images = [self._opened(path, row.id) for row in rows for path in row.images]
        return {"pixel_values": self.image_processor(images, return_tensors="pt")["pixel_values"]}


def encoder_of(processor: Any) -> type[Encoder]:
    """The encoder for a model's processor."""
    return Encoder if processor_family(processor).is_described else RenderedEncoder


def collator_of(processor: Any) -> type[Collator]:
    """The collator for a model's processor."""
    return Collator if processor_family(processor).is_described else RenderedCollator


def replace_images(row: "Row", num_images: int) -> "Row":
    """The row with its first pictures only."""
    return replace(row, images=row.images[:num_images])


def _parts(content: str) -> list[dict[str, str]]:
    """A content in the notation of chat templates: pictures and the texts between them."""
    first, *rest = content.split(IMAGE_PLACEHOLDER)
    parts = [{"type": "text", "text": first}] if first or not rest else []
    for text in rest:
        parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts
