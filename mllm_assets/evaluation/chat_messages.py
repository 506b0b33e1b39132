"""A row as the messages of OpenAI's protocol, its pictures in them."""

import base64
import mimetypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER, SYSTEM
from mllm_assets.data.sharegpt.rows import Message, Row
from mllm_assets.errors import DataError


def chat_messages(row: Row, system: str | None) -> list[dict[str, Any]]:
    """What precedes a row's last answer, as OpenAI's clients say it.

    Raises:
        DataError: The row has tools, which a chat request says in a way of its own.
    """
    for what, has_some in (("tools", row.tools), ("videos", row.videos)):
        if has_some:
            raise DataError(f"Row {row.id} has {what}, and a server is not asked with those here. Name another entry.")
    images = iter(row.images)
    messages = list(row.messages[:-1])
    if system and messages[0].role != SYSTEM:
        messages.insert(0, Message(SYSTEM, system))
    return [{"role": message.role, "content": _content(message.content, images)} for message in messages]


def _content(text: str, images: Iterator[Path]) -> str | list[dict[str, Any]]:
    first, *others = text.split(IMAGE_PLACEHOLDER)
    if not others:
        return text
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}] if first else []
    for after in others:
        parts.append({"type": "image_url", "image_url": {"url": _data_url(next(images))}})
        parts += [{"type": "text", "text": after}] if after else []
    return parts


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
