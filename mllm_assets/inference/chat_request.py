"""What a request for a chat completion may say, and what is refused, by the name of the field.

A request holds its images itself, as `data:` URLs. Nothing in it makes the server open a file, fetch an address, load
another model or render a template of the client's. A field that would change the answer, and cannot here, is refused.
"""

import base64
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mllm_assets.data.ingest.images import PictureError
from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER
from mllm_assets.data.sharegpt.rows import ASSISTANT, SYSTEM, USER, Message, Row
from mllm_assets.errors import ModelError
from mllm_assets.training.encoding.encode import Encoder
from mllm_assets.training.encoding.image_files import decoded

ROLES = (SYSTEM, USER, ASSISTANT)
BASE64_STEP = 2**16  # characters, four for three bytes; decoding holds up all threads for as long as a step takes
MIN_TEMPERATURE = 0.01  # logits divided by less overflow; below it the likeliest token is taken, as in vLLM
MAX_STOP_CHARS = 128  # transformers compares each place in it with each token of the vocabulary
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
_PICTURE = Image.linear_gradient("L").convert("RGB")
_QUESTION, _ANSWER, _SYSTEM = "What is shown in this image?", "A gradient.", "You answer in one sentence."


class RequestError(HTTPException):
    """A request that cannot be answered; `param` is the field that must change, as OpenAI's clients read it."""

    def __init__(self, param: str | None, message: str, status: int = 400) -> None:
        super().__init__(status, message)
        self.param = param


class ChatRequest(BaseModel):
    """The fields that count, and below those that change no answer and are accepted without effect."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    messages: list[Any] = Field(min_length=1)
    model: str | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=0, le=2)  # transformers knows a penalty, not a reward
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(min_length=1, max_length=4)] | None = None
    stream: bool | None = None

    n: Literal[1] | None = None
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    modalities: list[Literal["text"]] | None = None
    response_format: Mapping[Literal["type"], Literal["text"]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    stream_options: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    store: bool | None = None


def checked(body: Mapping[str, Any], *, model_name: str, vocab_size: int) -> dict[str, Any]:
    """Return the fields of a request that count.

    Raises:
        RequestError: One cannot be used. Names it; another model than `model_name` is not found (404).
    """
    try:
        request = ChatRequest.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise _refusal(error) from None
    if request.model not in (None, model_name):
        raise RequestError("model", f"This server has the model {model_name!r} alone, no {request.model[:64]!r}.", 404)
    if beyond := [token for token in request.logit_bias or () if int(token) >= vocab_size]:
        raise RequestError("logit_bias", f"logit_bias: the model has {vocab_size} tokens, so none has id {beyond[0]}.")
    fields = request.model_dump(exclude_none=True)
    if request.stop is not None:
        fields["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
    if request.temperature is not None and request.temperature < MIN_TEMPERATURE:
        fields["temperature"] = 0.0
    return fields


def _refusal(error: ValidationError) -> RequestError:
    """All that is wrong with the first field that is."""
    errors = error.errors(include_url=False, include_input=False)
    if not errors[0]["loc"]:
        return RequestError(None, "A field's name holds half a character (a lone surrogate).")
    name = str(errors[0]["loc"][0])
    if errors[0]["type"] == "extra_forbidden":
        shown = re.sub(r"[^\w.-]", "?", name)[:64]
        return RequestError(name[:64], f"{shown} is not supported by this server. Leave it out.")
    if name == "messages":
        return RequestError(name, "messages must be a list of at least one message.")
    wrong = " or ".join(dict.fromkeys(e["msg"] for e in errors if e["loc"][:1] == (name,)))
    return RequestError(name, f"{name}: {wrong}.")


def parts_of(message: Any, where: str) -> list[Any]:
    """The parts of a message's content.

    Raises:
        RequestError: The message cannot be used. Says which and why.
    """
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise RequestError(where, f"{where}: role must be one of {', '.join(ROLES)}.")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise RequestError(where, f"{where}: content must be a text or a list of parts.")
    return parts


def require_within(messages: Sequence[Sequence[Any]], *, max_chars: int, max_images: int) -> None:
    """Compare what the parts of all messages hold together with what a request may.

    Raises:
        RequestError: It is more. Says how much of what.
    """
    parts = [part for message in messages for part in message if isinstance(part, Mapping)]
    num_chars = sum(len(part["text"]) for part in parts if isinstance(part.get("text"), str))
    num_images = sum(part.get("type") == "image_url" for part in parts)
    for found, most, what in ((num_chars, max_chars, "characters"), (num_images, max_images, "images")):
        if found > most:
            raise RequestError("messages", f"The messages hold {found:,} {what}: at most {most:,}.", 413)


def picture(url: Any, where: str, **image_limits: int) -> Image.Image:
    """Decode a `data:` URL into an RGB image of an area within the limits, as in training.

    Raises:
        RequestError: It is another kind of URL, no image, or too large a one.
    """
    header, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not header.startswith("data:image/") or not header.endswith(";base64") or not comma:
        raise RequestError(
            where,
            f"{where}: image_url must be a data: URL (data:image/png;base64,...). This server fetches no address and "
            "opens no file.",
        )
    try:
        steps = (data[start : start + BASE64_STEP] for start in range(0, len(data), BASE64_STEP))
        return decoded(b"".join(base64.b64decode(step, validate=True) for step in steps), **image_limits)
    except PictureError as error:
        raise RequestError(where, f"{where}: the image cannot be used: {error}.") from None
    except ValueError:  # of base64, and of a character that is not ASCII
        raise RequestError(where, f"{where}: the image is not base64.") from None


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
            num_images = sum(message.content.count(IMAGE_PLACEHOLDER) for message in messages)
            expected = list(encoder.encode_prompt(Row("check", messages, (picture,) * num_images)).input_ids)
            chat = [{"role": message.role, "content": _parts(message.content)} for message in messages]
            batch = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
            if expected != (found := list(batch["input_ids"][0])):
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


def _parts(text: str) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": _PICTURE}] * text.count(IMAGE_PLACEHOLDER)
    return [*images, {"type": "text", "text": text.replace(IMAGE_PLACEHOLDER, "")}]
