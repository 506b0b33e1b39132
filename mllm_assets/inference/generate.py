"""Answers of a model to images and a prompt, in the turn format that it was trained in."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import TextStreamer

from mllm_assets.data.ingest.images import PictureError, open_picture
from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER
from mllm_assets.data.sharegpt.rows import SYSTEM, USER, Message, Row
from mllm_assets.errors import DataError
from mllm_assets.inference.answerer import Answer, Answerer
from mllm_assets.recipe.asking import Sampling
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.models.device import pick_device
from mllm_assets.training.runs.models import NamedModel


def generate(
    model: NamedModel,
    images: Sequence[Path],
    prompt: str,
    sampling: Sampling,
    *,
    device: str = "auto",
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Load a model and ask it once; `images` come in the order of the prompt's `<image>`, without any before it.

    Raises:
        ModelError: The model's directory holds no usable one.
        DataError: An image is missing, damaged or too large, their number differs from that of the placeholders, or
            the question is longer than the model's context.
        MachineError: The requested device is not available.
    """
    row = prompt_row(images, prompt)  # before the model is loaded
    return ask(open_model(model, device=device), row, sampling, on_text=on_text)


def open_model(model: NamedModel, *, device: str = "auto") -> Answerer:
    """Load a model to be asked.

    Raises:
        ModelError: Its directory holds no usable model.
        MachineError: The requested device is not available.
    """
    found = pick_device(device, warn=lambda text: print(f"warning: {text}", file=sys.stderr))
    return Answerer(model.directory, model.turns, device=found.kind)


def ask(answerer: Answerer, row: Row, sampling: Sampling, *, on_text: Callable[[str], None] | None = None) -> Answer:
    """Ask a loaded model about one row of `prompt_row`.

    `on_text` is called with each word once it is complete; of a model that reasons once, with the answer.

    Raises:
        DataError: An image is damaged, a text holds control tokens, or the question is longer than the context.
    """
    reasons = answerer.encoder.template.thought is not None
    streamer = _WordStreamer(answerer.tokenizer, on_text) if on_text and not reasons else None
    [answer] = _answers(answerer, [row], sampling, streamer)
    if on_text and reasons:
        on_text(answer.text)
    return answer


def answer_files(
    answerer: Answerer, images: Sequence[Path], prompt: str, sampling: Sampling, *, batch_size: int
) -> Iterator[tuple[Path, Answer | DataError]]:
    """Ask the same of each image, in batches, in the files' order; an error is that of one image and costs no other.

    Raises:
        DataError: The prompt has more than one `<image>`, or holds control tokens.
    """
    _with_placeholders(prompt, 1)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        try:
            answers = _answers(answerer, [prompt_row([image], prompt) for image in batch], sampling)
        except DataError as error:
            if len(batch) == 1:
                yield batch[0], error
            else:  # one of them is damaged, and the others are not
                yield from answer_files(answerer, batch, prompt, sampling, batch_size=1)
            continue
        yield from zip(batch, answers, strict=True)


def _answers(
    answerer: Answerer, rows: Sequence[Row], sampling: Sampling, streamer: TextStreamer | None = None
) -> list[Answer]:
    """Answers of at most the length for which the model's context has room."""
    encoded = [_encoded(answerer, row) for row in rows]
    room = min(answerer.room_for_answer(len(row.input_ids)) for row in encoded)
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    return answerer.answers(encoded, sampling, streamer=streamer)


class _WordStreamer(TextStreamer):
    """Hands over complete words as they come, without the white space around the answer."""

    def __init__(self, tokenizer: object, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
        self._on_text, self._begun = on_text, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self._begun else text.lstrip()
        text = text.rstrip() if stream_end else text
        self._begun = self._begun or bool(text)
        if text:
            self._on_text(text)


def prompt_row(images: Sequence[Path], prompt: str, system: str | None = None, earlier: Sequence[Message] = ()) -> Row:
    """A question as a row without an answer and without a name.

    `earlier` are the turns before it, of a row that this function made and the answer to it; its images come first.

    Raises:
        DataError: A file is missing, not an image or too large, or the number of placeholders is not that of the
            images.
    """
    for image in images:
        try:
            with open_picture(image):
                pass
        except PictureError as error:
            raise DataError(f"The image {image} cannot be used: {error}. Give another file.") from None
    before = (*((Message(SYSTEM, system),) if system else ()), *earlier)
    placed = sum(message.content.count(IMAGE_PLACEHOLDER) for message in earlier)
    return Row("", (*before, Message(USER, _with_placeholders(prompt, len(images) - placed))), tuple(images))


def _with_placeholders(prompt: str, num_images: int) -> str:
    """The prompt with a place for each image.

    Raises:
        DataError: It has places for another number of images.
    """
    num_placeholders = prompt.count(IMAGE_PLACEHOLDER)
    if num_placeholders == num_images:
        return prompt
    if not num_placeholders:
        return IMAGE_PLACEHOLDER * num_images + prompt
    raise DataError(
        f"The prompt has {num_placeholders} {IMAGE_PLACEHOLDER} placeholders for {num_images} images. "
        "Give one each, or none to put the images before the prompt."
    )


def _encoded(answerer: Answerer, row: Row) -> EncodedRow:
    """Encode a question.

    Raises:
        DataError: A text of it holds control tokens. Says which text.
    """
    encoder = answerer.encoder
    *before, question = row.messages
    texts = [("prompt", question.content), ("system text", encoder.turns.system or "")]
    texts += [("system text" if message.role == SYSTEM else "turn before it", message.content) for message in before]
    for name, text in texts:
        for part in text.split(IMAGE_PLACEHOLDER):
            if found := encoder.turns.control_token.search(part):
                raise DataError(
                    f"The {name} holds {found.group()!r}, which steers the model and would be read as that, not as "
                    "text. Take it out."
                )
    return encoder.encode_prompt(row)
