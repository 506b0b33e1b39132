"""One answer of a model to images and a prompt, in the turn format that it was trained on."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.data.sharegpt import USER, Message, Row
from mllm_assets.errors import DataError, ModelError
from mllm_assets.inference.answerer import Answerer, Sampling, is_checkpoint
from mllm_assets.training.encode import IMAGE_PLACEHOLDER
from mllm_assets.training.memory import pick_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """An answer; `time_s` is the generation alone, without loading the model."""

    text: str
    time_s: float
    num_tokens: int


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
    """Ask a model.

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
        DataError: An image is missing or damaged, or their number differs from that of the placeholders.
        MachineError: The device asked for is not there.
    """
    sampling = Sampling(do_sample=do_sample, temperature=temperature, top_p=top_p, seed=seed)
    row = prompt_row(images, prompt)
    answerer = Answerer(find_model(model_dir), device=pick_device(device).kind, system=system, template=template)
    encoded = answerer.encoder.encode_prompt(row)
    started = time.perf_counter()
    (answer,) = answerer.answers([encoded], max_new_tokens=max_new_tokens, sampling=sampling)
    return Generation(text=answer.text, time_s=time.perf_counter() - started, num_tokens=answer.num_tokens)


def find_model(directory: Path) -> Path:
    """The model directory or checkpoint that a path stands for: itself, or `model/` of a training run.

    Raises:
        ModelError: There is none. Says what the path is and what to give in its place.
    """
    if (directory / "config.json").is_file() or is_checkpoint(directory):
        return directory
    if (directory / "model" / "config.json").is_file():
        return directory / "model"
    if not directory.exists():
        raise ModelError(
            f"{directory} does not exist. Give a model directory, for example outputs/<recipe>/latest/model."
        )
    raise ModelError(
        f"{directory} is no model directory: it has neither config.json nor model/config.json. "
        "Give a Hugging Face model directory, a release or a finished training run."
    )


def prompt_row(images: Sequence[Path], prompt: str) -> Row:
    """A question as a row without an answer.

    Raises:
        DataError: An image does not exist, or the number of placeholders is not that of the images.
    """
    for image in images:
        if not image.is_file():
            raise DataError(f"The image {image} does not exist. Check the path.")
    num_placeholders = prompt.count(IMAGE_PLACEHOLDER)
    if not num_placeholders:
        prompt = IMAGE_PLACEHOLDER * len(images) + prompt
    elif num_placeholders != len(images):
        raise DataError(
            f"The prompt has {num_placeholders} {IMAGE_PLACEHOLDER} placeholders for {len(images)} images. "
            "Give one each, or none to put the images before the prompt."
        )
    return Row("prompt", (Message(USER, prompt),), tuple(images))
