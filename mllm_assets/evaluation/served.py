"""A model behind a server that speaks OpenAI's protocol, such as vLLM, asked about rows. A server gives no loss."""

import os
import time
from typing import Any

from openai import APIError, OpenAI

from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import MachineError
from mllm_assets.evaluation.agreement import Told
from mllm_assets.evaluation.chat_messages import chat_messages

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
        messages: Any = chat_messages(row, self._system)
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


def _only_model(client: OpenAI) -> str:
    try:
        names = [model.id for model in client.models.list().data]
    except APIError as error:
        raise _refused(client, error) from None
    if len(names) != 1:
        raise MachineError(
            f"{client.base_url} has {len(names)} models ({', '.join(names[:5])}). Name one: "
            "--served-name, or backend_model of a recipe's evaluation."
        )
    return names[0]


def _refused(client: OpenAI, error: APIError) -> MachineError:
    cause = " ".join(str(error.__cause__ or error).split())[:300]
    return MachineError(
        f"{client.base_url} does not answer as an OpenAI-compatible server does ({type(error).__name__}: {cause}). "
        "Check address, key (MLLM_ASSETS_API_KEY) and the server's log."
    )
