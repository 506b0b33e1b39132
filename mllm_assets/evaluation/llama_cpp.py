"""A GGUF model with its projector in llama.cpp, in this process, asked about rows. It gives no losses of answers."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import ModelError
from mllm_assets.evaluation.agreement import Told
from mllm_assets.evaluation.chat_messages import chat_messages

TIMEOUT_S = 60


def without_pictures(row: Row) -> Row:
    """The row's texts alone: llama.cpp says the tokens of those, and how many there are with the pictures."""
    messages = [replace(one, content=one.content.replace(IMAGE_PLACEHOLDER, "")) for one in row.messages]
    return replace(row, messages=tuple(messages), images=())


class LlamaCpp:
    """llama.cpp's server on a port of this machine, by the bindings of `xllamacpp`, with the files' own chat template.

    Args:
        model: The text model's file.
        projector: The vision part's.
        system: The system text for rows without one.
        num_tokens: For which it reserves memory: the longest prompt with its answer.
        num_threads: Of the CPU; None for its own choice.

    Raises:
        ModelError: It does not load the files.
    """

    def __init__(
        self, model: Path, projector: Path, *, system: str | None, num_tokens: int, num_threads: int | None
    ) -> None:
        import xllamacpp  # pyright: ignore[reportMissingImports] (an extra)

        options = xllamacpp.CommonParams()
        options.model.path, options.mmproj.path = str(model), str(projector)
        options.n_ctx, options.n_parallel, options.n_gpu_layers = num_tokens, 1, 0
        options.use_jinja, options.warmup, options.verbosity = True, False, -1
        if num_threads:
            options.cpuparams.n_threads = options.cpuparams_batch.n_threads = num_threads
        try:
            self._server = xllamacpp.Server(options)
        except Exception as error:  # the bindings have no class of their own
            raise ModelError(f"llama.cpp does not load {model} ({error}). Convert it by another checkout.") from error
        self._system = system

    def ask(self, row: Row, max_new_tokens: int) -> Told:
        """Answer what precedes a row's last answer.

        Raises:
            ModelError: It does not answer.
            DataError: The row cannot be asked.
        """
        started = time.perf_counter()
        request = {"messages": chat_messages(row, self._system), "temperature": 0, "max_tokens": max_new_tokens}
        given = self._server.handle_chat_completions({**request, "cache_prompt": False})
        if not given.get("choices"):
            raise ModelError(
                f"llama.cpp does not answer row {row.id} ({str(given)[:200]}). Convert by another checkout."
            )
        usage = given.get("usage") or {}
        return Told(
            text=given["choices"][0]["message"].get("content") or "",
            num_prompt_tokens=usage.get("prompt_tokens"),
            num_tokens=usage.get("completion_tokens"),
            wall_s=time.perf_counter() - started,
            prompt_ids=self._tokens(without_pictures(row)),
        )

    def _tokens(self, row: Row) -> list[int]:
        """The tokens of a prompt of texts, by the chat template in the file."""
        made = self._post("/apply-template", {"messages": chat_messages(row, self._system)})
        asked = {"content": made["prompt"], "add_special": True, "parse_special": True}
        return self._post("/tokenize", asked)["tokens"]

    def _post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        request = Request(self._server.listening_address + path, json.dumps(content).encode())
        request.add_header("Content-Type", "application/json")
        with urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.loads(answer.read())
