"""A model behind a server that speaks OpenAI's protocol, such as vLLM, asked about rows. A server gives no loss."""

import base64
import mimetypes
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openai import APIError, OpenAI

from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER, SYSTEM
from mllm_assets.data.sharegpt.rows import Message, Row
from mllm_assets.errors import DataError, MachineError
from mllm_assets.evaluation.agreement import Told

KEY_VARIABLE = "MLLM_ASSETS_API_KEY"
TIMEOUT_S = 300
MAX_CHARS_A_TOKEN = 64  # of an answer: no tokenizer has longer ones, and a server may say anything


def connect(url: str, *, max_retries: int = 1) -> OpenAI:
    """A client of a server. The key is the environment's alone."""
    key = os.environ.get(KEY_VARIABLE) or "none"
    return OpenAI(base_url=url, api_key=key, max_retries=max_retries, timeout=TIMEOUT_S)


class Served:
    """A server's model; without a name its only one.

    Args:
        client: Of the server.
        name: The model there.
        system: The system text for rows without one.

    Raises:
        MachineError: The server does not answer, or has several models.
    """

    def __init__(self, client: OpenAI, name: str | None, system: str | None) -> None:
        self._client, self._system = client, system
        self.name = name or _only_model(client)

    def ask(self, row: Row, max_new_tokens: int) -> Told:
        """Answer what precedes a row's last answer.

        Raises:
            MachineError: The server does not answer, or refuses.
            DataError: The row cannot be asked.
        """
        messages: Any = _messages(row, self._system)
        started = time.perf_counter()
        try:
            given = self._client.chat.completions.create(
                model=self.name, messages=messages, temperature=0, max_tokens=max_new_tokens
            )
        except APIError as error:
            raise _refused(self._client, error) from None
        if not given.choices:
            raise MachineError(f"{self._client.base_url} gave no answer. Look at the server's log.")
        text = given.choices[0].message.content or ""
        if len(text) > max_new_tokens * MAX_CHARS_A_TOKEN:
            raise MachineError(
                f"{self._client.base_url} gave {len(text):,} characters for at most {max_new_tokens} tokens, so it "
                "does not heed max_tokens. Look at the server."
            )
        return Told(
            text=text,
            num_prompt_tokens=given.usage.prompt_tokens if given.usage else None,
            num_tokens=given.usage.completion_tokens if given.usage else None,
            wall_s=time.perf_counter() - started,
        )


def _messages(row: Row, system: str | None) -> list[dict[str, Any]]:
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


def _only_model(client: OpenAI) -> str:
    try:
        names = [model.id for model in client.models.list().data]
    except APIError as error:
        raise _refused(client, error) from None
    if len(names) != 1:
        raise MachineError(
            f"{client.base_url} has {len(names)} models ({', '.join(names[:5])}). Name one: --served-name"
        )
    return names[0]


def _refused(client: OpenAI, error: APIError) -> MachineError:
    cause = " ".join(str(error.__cause__ or error).split())[:300]
    return MachineError(
        f"{client.base_url} does not answer as an OpenAI-compatible server does ({type(error).__name__}: {cause}). "
        "Check address, key (MLLM_ASSETS_API_KEY) and the server's log."
    )
