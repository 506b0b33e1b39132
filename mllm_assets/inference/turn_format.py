"""Whether a model directory's chat template says what the model was trained on, token for token."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mllm_assets.data.sharegpt import ASSISTANT, SYSTEM, USER, Message, Row
from mllm_assets.data.tokens import IMAGE_PLACEHOLDER
from mllm_assets.errors import ModelError
from mllm_assets.training.encode import Encoder

_PICTURE = Image.linear_gradient("L").convert("RGB")
_QUESTION, _ANSWER, _SYSTEM = "What is shown in this image?", "A gradient.", "You answer in one sentence."
_IMAGE_QUESTION = Message(USER, IMAGE_PLACEHOLDER + _QUESTION)
CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    "a question": (Message(USER, _QUESTION),),
    "an image and a question": (_IMAGE_QUESTION,),
    "a system text, an image and a question": (Message(SYSTEM, _SYSTEM), _IMAGE_QUESTION),
    "two turns": (_IMAGE_QUESTION, Message(ASSISTANT, _ANSWER), Message(USER, _QUESTION)),
}


def require_same_format(encoder: Encoder, processor: Any, where: str) -> None:
    """Compare the tokens of the processor's chat template with those that training encodes, on a few conversations.

    Raises:
        ModelError: They differ, so that a chat program would ask the model in a format that it does not know.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        _PICTURE.save(picture)
        for name, messages in CONVERSATIONS.items():
            expected, found = trained_ids(encoder, messages, picture), template_ids(processor, messages)
            if expected != found:
                raise ModelError(_difference(processor.tokenizer, name, expected, found, where))


def _difference(tokenizer: Any, name: str, expected: list[int], found: list[int], where: str) -> str:
    same = (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b)
    index = next(same, min(len(expected), len(found)))
    shown = [tokenizer.decode(ids[max(0, index - 2) : index + 6]) for ids in (expected, found)]
    return (
        f"The chat template in {where} asks the model in another format than the one it was trained in: in {name}, "
        f"from token {index} on, expected {shown[0]!r}, got {shown[1]!r}. Take chat_template.jinja from the model that "
        "it was trained from, or ask it with `mllm-assets generate`, which uses the training's own format."
    )


def trained_ids(encoder: Encoder, messages: Sequence[Message], picture: Path) -> list[int]:
    """Return the token ids up to where the model answers, as training encodes them; `picture` is each image."""
    num_images = sum(message.content.count(IMAGE_PLACEHOLDER) for message in messages)
    return list(encoder.encode_prompt(Row("check", tuple(messages), (picture,) * num_images)).input_ids)


def template_ids(processor: Any, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of the same conversation from the processor's chat template."""
    chat = [{"role": message.role, "content": _parts(message.content)} for message in messages]
    batch = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(batch["input_ids"][0])


def _parts(text: str) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": _PICTURE}] * text.count(IMAGE_PLACEHOLDER)
    return [*images, {"type": "text", "text": text.replace(IMAGE_PLACEHOLDER, "")}]
