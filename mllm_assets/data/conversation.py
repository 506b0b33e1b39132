"""Whole conversations of a source: any of the usual notations becomes one list of `role` and `content`."""

import json
from collections.abc import Mapping
from typing import Any

from mllm_assets.data.tokens import IMAGE_PLACEHOLDER, text_defect

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# the two notations in use: OpenAI's `role`/`content`, and ShareGPT's `from`/`value` with its own names of the roles
NOTATIONS = (("role", "content"), ("from", "value"))
ROLES = {"human": USER, "gpt": ASSISTANT, USER: USER, ASSISTANT: ASSISTANT, SYSTEM: SYSTEM}


def as_conversation(value: Any, *, system: str | None = None) -> str:
    """A conversation as JSON: `[{"role": ..., "content": ...}, ...]`.

    What cannot be understood is kept as it is, so that `conversation_defect` names it and the row is counted.

    Args:
        value: A list of turns in either notation, or its JSON text; a content may be a list of text and image parts.
        system: A system text that stands outside the list; one in the list wins.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):  # no JSON, or nested by the thousand
            value = [value]
    turns = [_turn(turn) for turn in value] if isinstance(value, list) else [value]
    if system and not (turns and isinstance(turns[0], dict) and turns[0].get("role") == SYSTEM):
        turns = [{"role": SYSTEM, "content": system}, *turns]
    return json.dumps(turns, ensure_ascii=True)


def read_conversation(messages: str) -> list[dict[str, str]]:
    """The turns of a conversation without a defect."""
    return json.loads(messages)


def answers_of(messages: str) -> str:
    """All that the assistant says, one answer a line: what caption statistics are measured on."""
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


def num_placeholders(turns: list[dict[str, str]]) -> int:
    return sum(turn["content"].count(IMAGE_PLACEHOLDER) for turn in turns if turn["role"] == USER)


def with_placeholders(turns: list[dict[str, str]], num_images: int) -> list[dict[str, str]]:
    """Put one placeholder an image before the first user text, where the conversation holds none."""
    if num_placeholders(turns):
        return turns
    first = next(index for index, turn in enumerate(turns) if turn["role"] == USER)
    shown = {**turns[first], "content": IMAGE_PLACEHOLDER * num_images + turns[first]["content"]}
    return [*turns[:first], shown, *turns[first + 1 :]]


def _turn(turn: Any) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    for role_key, content_key in NOTATIONS:
        if turn.get(role_key) is not None and turn.get(content_key) is not None:
            role = turn[role_key]
            known = ROLES.get(role, role) if isinstance(role, str) else role
            return {"role": known, "content": _content(turn[content_key])}
    return dict(turn)


def _content(content: Any) -> Any:
    """Join the parts of a content that is a list, as chat templates take it."""
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    shown = [IMAGE_PLACEHOLDER if part.get("type") == "image" else part.get("text") for part in parts]
    texts = [part for part in shown if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(shown) else content


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
