"""Answers of a model to images and a prompt, in the turn format that it was trained in."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import TextStreamer

from mllm_assets.data.images import require_decodable
from mllm_assets.data.sharegpt import SYSTEM, USER, Message, Row
from mllm_assets.data.tokens import IMAGE_PLACEHOLDER
from mllm_assets.errors import DataError
from mllm_assets.inference.answerer import Answerer, Sampling
from mllm_assets.inference.naming import NamedModel, find_model
from mllm_assets.training.device import pick_device
from mllm_assets.training.encode import EncodedRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """An answer; `time_s` is the generation alone, without loading the model. In a batch it is the image's share."""

    text: str
    time_s: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FileAnswer:
    """What a model says of one image file, or why it could not be asked."""

    image: Path
    answer: Generation | None = None
    error: str | None = None


def generate(
    model_dir: Path,
    images: Sequence[Path],
    prompt: str,
    system: str | None = None,
    max_new_tokens: int = 100,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    device: str = "auto",
    seed: int | None = None,
    template: str | None = None,
) -> Generation:
    """Ask a model once.

    Args:
        model_dir: A Hugging Face model directory, a release, a training run's directory, or a checkpoint of one.
        images: In the order of the prompt's `<image>` placeholders; without placeholders they stand before it.
        prompt: The question.
        system: A system text; none by default, as in training.
        max_new_tokens: The answer is cut after so many tokens.
        do_sample: Draw tokens in place of taking the likeliest.
        temperature: Of the drawing.
        top_p: Draw from the likeliest tokens that together have this probability.
        device: auto, cuda, mps or cpu.
        seed: Of the drawing.
        template: Turn format that the model was trained in; None for its family's usual one.

    Raises:
        ModelError: `model_dir` holds no usable model.
        DataError: An image is missing, damaged or too large, their number differs from that of the placeholders, or
            the question is longer than the model's context.
        MachineError: The device asked for is not there.
    """
    sampling = Sampling(do_sample=do_sample, temperature=temperature, top_p=top_p, seed=seed)
    row = prompt_row(images, prompt)
    model = NamedModel(name=str(model_dir), directory=find_model(model_dir), template=template)
    answerer = open_model(model, device=device, system=system)
    return ask(answerer, row, max_new_tokens=max_new_tokens, sampling=sampling)


def open_model(model: NamedModel, *, device: str = "auto", system: str | None = None) -> Answerer:
    """Load a model to be asked.

    Raises:
        ModelError: Its directory holds no usable model.
        MachineError: The device asked for is not there.
    """
    return Answerer(
        model.directory,
        device=pick_device(device).kind,
        system=system,
        template=model.template,
        enable_thinking=model.enable_thinking,
        image_max_pixels=model.image_max_pixels,
        image_min_pixels=model.image_min_pixels,
    )


def ask(
    answerer: Answerer,
    row: Row,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    tell: Callable[[str], None] | None = None,
) -> Generation:
    """Ask a loaded model about one row of `prompt_row`.

    Args:
        answerer: The model.
        row: The question.
        max_new_tokens: The answer is cut after so many tokens.
        sampling: How tokens are drawn.
        tell: Told each word as soon as it is whole. The reasoning of a model that reasons is not told: its answer
            comes at once at the end.

    Raises:
        DataError: An image is damaged, a text holds control tokens, or the question is longer than the context.
    """
    encoded = _encoded(answerer, row)
    max_new_tokens = min(max_new_tokens, answerer.room_for_answer(len(encoded.input_ids)))
    reasons = answerer.encoder.template.thought is not None
    streamer = _Teller(answerer.tokenizer, tell) if tell and not reasons else None
    started = time.perf_counter()
    (answer,) = answerer.answers([encoded], max_new_tokens=max_new_tokens, sampling=sampling, streamer=streamer)
    generation = Generation(text=answer.text, time_s=time.perf_counter() - started, num_tokens=answer.num_tokens)
    if tell and reasons:
        tell(generation.text)
    return generation


def answer_files(
    answerer: Answerer,
    images: Sequence[Path],
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    batch_size: int,
) -> Iterator[FileAnswer]:
    """Ask the same of each image, in batches, in the files' order. A file that is no image costs its own answer only.

    Raises:
        DataError: The prompt has more than one `<image>`, or holds control tokens.
    """
    _with_placeholders(prompt, 1)
    for start in range(0, len(images), batch_size):
        yield from _answer_batch(answerer, images[start : start + batch_size], prompt, max_new_tokens, sampling)


def _answer_batch(
    answerer: Answerer, images: Sequence[Path], prompt: str, max_new_tokens: int, sampling: Sampling
) -> Iterator[FileAnswer]:
    try:
        rows = [_encoded(answerer, prompt_row([image], prompt)) for image in images]
        room = min(answerer.room_for_answer(len(row.input_ids)) for row in rows)
        max_new_tokens = min(max_new_tokens, room)
        answers = answerer.answers(rows, max_new_tokens=max_new_tokens, sampling=sampling)
    except DataError as error:
        if len(images) == 1:
            yield FileAnswer(image=images[0], error=str(error))
            return
        for image in images:  # one of them is damaged, and the others are not
            yield from _answer_batch(answerer, [image], prompt, max_new_tokens, sampling)
        return
    for image, answer in zip(images, answers, strict=True):
        generation = Generation(text=answer.text, time_s=answer.latency_s, num_tokens=answer.num_tokens)
        yield FileAnswer(image=image, answer=generation)


class _Teller(TextStreamer):
    """Hands over whole words as they come, without what surrounds the answer."""

    def __init__(self, tokenizer: object, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
        self._tell, self._begun = tell, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self._begun else text.lstrip()
        text = text.rstrip() if stream_end else text
        self._begun = self._begun or bool(text)
        if text:
            self._tell(text)


def prompt_row(images: Sequence[Path], prompt: str, system: str | None = None) -> Row:
    """A question as a row without an answer and without a name.

    Raises:
        DataError: An image does not exist, is none or is too large, or the number of placeholders is not that of the
            images.
    """
    for image in images:
        if not image.is_file():
            raise DataError(f"The image {image} does not exist. Check the path.")
        try:
            require_decodable(image, f"The image {image}")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"The image {image} cannot be read ({type(error).__name__}: {error}). Give another file."
            ) from None
    before = (Message(SYSTEM, system),) if system else ()
    return Row("", (*before, Message(USER, _with_placeholders(prompt, len(images)))), tuple(images))


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
    *system, question = row.messages
    texts = {"prompt": question.content, "system text": system[0].content if system else encoder.turns.system or ""}
    for name, text in texts.items():
        for part in text.split(IMAGE_PLACEHOLDER):
            if found := encoder.turns.control_token.search(part):
                raise DataError(
                    f"The {name} holds {found.group()!r}, which steers the model and would be read as that, not as "
                    "text. Take it out."
                )
    return encoder.encode_prompt(row)
