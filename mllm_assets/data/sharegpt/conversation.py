"""Conversations of a source: any of the usual notations becomes one list of `role` and `content`."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.data.sharegpt.json_text import LIMITS, decode
from mllm_assets.errors import DataError

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
OBSERVATION, FUNCTION = "observation", "function"  # what a tool gave back, and an answer that calls tools
ASKING, ANSWERING = (USER, OBSERVATION), (ASSISTANT, FUNCTION)
# where a turn has its role and its text: OpenAI's notation, ShareGPT's, and others in use
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text", "parts")
ROLES = {"human": USER, "gpt": ASSISTANT, "bot": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT,
         USER: USER, ASSISTANT: ASSISTANT, SYSTEM: SYSTEM}  # fmt: skip
# a question and its answer in one object, as the_cauldron and docmatix have them in `texts`
PAIRS = (("user", "assistant"), ("question", "answer"), ("prompt", "completion"), ("human", "gpt"),
         ("instruction", "output"), ("query", "response"))  # fmt: skip
WRAPPERS = ("messages", "conversations", "conversation", "turns")
# Gemma 3's control tokens (tokenizer_config.json of google/gemma-3-4b-it) and LLaMA-Factory's media placeholders
# (src/llamafactory/extras/constants.py): in a text they would be read as control, not as text.
CONTROL_TOKENS = (
    "<bos> <eos> <pad> <unk> <mask> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> <image_soft_token> "
    "<image> <video> <audio>"
).split()
IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER = "<image>", "<video>"
# of a content's part that is a picture: its type, or the key that holds it
PICTURE_KEYS = ("image", "image_url", "input_image", "url", "path", "base64")
# Qwen-VL's notation
_NAMED_PICTURE = re.compile(r"(?:Picture \d+:\s*)?<img>([^<>\n]+)</img>\n?")
# C0 and C1 except tab and line ends: not printable, and terminals obey some. Marks of direction are text.
_CONTROL_CHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# what decoders write for undecodable bytes, and lone surrogates
_UNDECODABLE = re.compile("[\ufffd\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as JSON, and the pictures that are in its parts themselves, in order of their placeholders."""

    messages: str
    pictures: tuple[Any, ...] = ()


def as_conversation(value: Any, *, system: str | None = None) -> Conversation:
    """A conversation as JSON: `[{"role": ..., "content": ...}, ...]`.

    What cannot be understood is kept unchanged, so that `conversation_defect` names it and the row is counted.
    `value` is a list of turns or of pairs in any notation in use, or its JSON text; a content may be a list of text and
    image parts. A system text in the list wins over `system`.
    """
    pictures: list[Any] = []
    turns = [message for turn in _listed(value) for message in _messages(turn, pictures)]
    if system and not (turns and isinstance(turns[0], dict) and turns[0].get("role") == SYSTEM):
        turns = [{"role": SYSTEM, "content": system}, *turns]
    return Conversation(json.dumps(turns, ensure_ascii=True, default=repr), tuple(pictures))


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = decode(value, Path("messages"), 1) if len(value) <= LIMITS.max_line_bytes else [value[:100]]
        except DataError:  # not JSON, or nested too deeply
            value = [value]
    if isinstance(value, Mapping):
        if (inner := next((value[name] for name in WRAPPERS if isinstance(value.get(name), list)), None)) is not None:
            return inner
        if value and all(isinstance(column, list) for column in value.values()):  # older `datasets`: lists by key
            return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=False)]
    return value if isinstance(value, list) else [value]


def read_conversation(messages: str) -> list[dict[str, str]]:
    """The turns of a conversation without a defect."""
    return json.loads(messages)


def answers_of(messages: str) -> str:
    """The assistant's answers, one a line; caption statistics are measured on them."""
    turns = [turn for turn in json.loads(messages) if isinstance(turn, dict) and turn.get("role") == ASSISTANT]
    return "\n".join(turn["content"] for turn in turns if isinstance(turn.get("content"), str))


def conversation_defect(messages: str, num_images: int, max_chars: int) -> str | None:
    """Why a conversation cannot be trained on, as a reason slug, or None."""
    turns = json.loads(messages)
    if not all(_is_message(turn) for turn in turns):
        return "messages_unreadable"
    spoken = turns[1:] if turns and turns[0]["role"] == SYSTEM else turns
    if not spoken or [turn["role"] for turn in spoken] != [USER, ASSISTANT] * (len(spoken) // 2):
        return "messages_role_order"
    if any(not turn["content"].strip() for turn in spoken):
        return "messages_empty"
    if sum(len(turn["content"]) for turn in turns) > max_chars:
        return "messages_too_long"
    for turn in turns:
        text = turn["content"].replace(IMAGE_PLACEHOLDER, "") if turn["role"] == USER else turn["content"]
        if defect := text_defect(text):
            return f"messages_{defect}"
    if num_placeholders(turns) not in (0, num_images):
        return "messages_placeholder_count"
    return None


def without_placeholders(text: str) -> str:
    """A text as a person reads it, without the places of its pictures and videos."""
    return text.replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "").strip()


def num_placeholders(turns: list[dict[str, str]]) -> int:
    return sum(turn["content"].count(IMAGE_PLACEHOLDER) for turn in turns if turn["role"] == USER)


def with_placeholders(turns: list[dict[str, str]], num_images: int) -> list[dict[str, str]]:
    """Put one placeholder per image before the first user text, if the conversation has none."""
    if num_placeholders(turns):
        return turns
    first = next(index for index, turn in enumerate(turns) if turn["role"] == USER)
    shown = {**turns[first], "content": IMAGE_PLACEHOLDER * num_images + turns[first]["content"]}
    return [*turns[:first], shown, *turns[first + 1 :]]


def _messages(turn: Any, pictures: list[Any]) -> list[Any]:
    """The one message of a turn, or the two of a pair; a part's own picture is added to `pictures`."""
    if isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
        return [{"role": USER, "content": turn[0]}, {"role": ASSISTANT, "content": turn[1]}]
    if not isinstance(turn, Mapping):
        return [turn]
    role_key = next((key for key in ROLE_KEYS if turn.get(key) is not None), None)
    content_key = next((key for key in CONTENT_KEYS if turn.get(key) is not None), None)
    if role_key and content_key:
        role = turn[role_key]
        known = ROLES.get(role.lower(), role) if isinstance(role, str) else role
        return [{"role": known, "content": content_text(turn[content_key], pictures)}]
    for asked, answered in PAIRS:
        if role_key is None and turn.get(asked) is not None and turn.get(answered) is not None:
            texts = (content_text(turn[asked], pictures), content_text(turn[answered], pictures))
            return [{"role": USER, "content": texts[0]}, {"role": ASSISTANT, "content": texts[1]}]
    return [dict(turn)]


def content_text(content: Any, pictures: list[Any] | None = None) -> Any:
    """Join the parts of a content that is a list, as chat templates take it; their pictures go into `pictures`.

    A part is a text, or an object with one: OpenAI's `text`, `image` and `image_url`, Qwen's `image` without a type.
    """
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, str) and pictures is not None and _NAMED_PICTURE.search(content):
        pictures += _NAMED_PICTURE.findall(content)
        return _NAMED_PICTURE.sub(IMAGE_PLACEHOLDER, content)
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, Mapping) else {"type": "text", "text": part} for part in content]
    texts = []
    for part in parts:
        kind = part.get("type")
        found = [part[name] for name in PICTURE_KEYS if part.get(name) is not None]
        if kind in PICTURE_KEYS or (kind is None and found):
            texts.append(IMAGE_PLACEHOLDER)
            if pictures is not None and found:
                inner = found[0].get("url") if isinstance(found[0], Mapping) and "url" in found[0] else found[0]
                pictures.append(inner)
        elif kind in (None, "text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            return content
    return "".join(texts)


def names_pictures(text: str) -> bool:
    """Whether a text names pictures in Qwen-VL's notation."""
    return _NAMED_PICTURE.search(text) is not None


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


_PATTERN = re.compile("|".join(re.escape(token) for token in CONTROL_TOKENS) + r"|<unused\d+>")


def find_control_token(text: str) -> str | None:
    """The first control token in a text, or None."""
    match = _PATTERN.search(text)
    return match.group() if match else None


def text_defect(text: str) -> str | None:
    """Why a text cannot be trained on: "control_token", "control_character", "undecodable", or None."""
    if find_control_token(text):
        return "control_token"
    if _CONTROL_CHARACTER.search(text):
        return "control_character"
    return "undecodable" if _UNDECODABLE.search(text) else None
