"""A record of what a served model was asked and said: whoever asks it may count a request that failed as an answer."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ASKING = "/v1/chat/completions"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """One request and what became of it.

    Attributes:
        pictures: A digest of each picture that was sent.
        answer: None where the request failed.
        problem: Why it did.
    """

    pictures: tuple[str, ...] = ()
    answer: str | None = None
    problem: str | None = None


class Recorder:
    """Passes everything on, and records questions with what the application makes of them."""

    def __init__(self, app: "ASGIApp", *, exchanges: list[Exchange]) -> None:
        self._app, self._exchanges = app, exchanges

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http" or scope["path"] != ASKING:
            await self._app(scope, receive, send)
            return
        asked, said, status = bytearray(), bytearray(), 0

        async def receive_body() -> "Message":
            message = await receive()
            asked.extend(message.get("body", b""))
            return message

        async def send_answer(message: "Message") -> None:
            nonlocal status
            status = message.get("status", status)
            said.extend(message.get("body", b""))
            # before the client has it, or it could be counted while this is not there yet
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self._exchanges.append(exchange_of(bytes(asked), status, bytes(said)))
            await send(message)

        await self._app(scope, receive_body, send_answer)


def exchange_of(asked: bytes, status: int, said: bytes) -> Exchange:
    """Read what was sent both ways."""
    answered = _json(said)
    if status != 200:
        error = answered.get("error")
        text = error.get("message") if isinstance(error, Mapping) else None
        return Exchange(pictures=_pictures(asked), problem=str(text or f"status {status}"))
    try:
        answer = answered["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return Exchange(pictures=_pictures(asked), problem="the server's answer has no text")
    return Exchange(pictures=_pictures(asked), answer=answer or "")


def _pictures(asked: bytes) -> tuple[str, ...]:
    found = []
    messages = _json(asked).get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and part.get("type") == "image_url":
                address = part.get("image_url")
                text = address.get("url") if isinstance(address, Mapping) else address
                found.append(hashlib.sha256(str(text).encode(errors="replace")).hexdigest()[:16])
    return tuple(found)


def _json(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
