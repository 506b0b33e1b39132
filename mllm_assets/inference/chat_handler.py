"""transformers' own chat completions for one loaded model, in the turn format that it was trained in."""

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any

import torch
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState, _GenerationCancelled, _StreamError

from mllm_assets.errors import DataError, OutOfMemoryError
from mllm_assets.inference.answerer import Answerer
from mllm_assets.inference.chat_request import RequestError, checked, parts_of, picture, require_within
from mllm_assets.inference.connections import Limits
from mllm_assets.training.encoding.turns import control_token_pattern
from mllm_assets.training.models.device import out_of_memory_is_an_error

CLIENT_GONE: ContextVar[threading.Event] = ContextVar("CLIENT_GONE")  # of the request that is answered
FEWER = "Send fewer or smaller images, a shorter text, or ask for fewer tokens; or send it again later."
STEP, OVERLAP = 1024, 256  # characters; no token that steers a model is longer than the second


class OneModel(ModelManager):
    """Serves a model that is loaded already, under one name."""

    def __init__(self, name: str, directory: Path, answerer: Answerer, processor: Any) -> None:
        super().__init__(device=str(answerer.device), model_timeout=-1)
        self.name = self.force_model = name  # set late: the constructor would load it
        self._created_s = int(directory.stat().st_mtime)
        self._loaded = (answerer.model, processor)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # `emoji_sft@v1` is a release here, not a revision on the Hub

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self._loaded

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [{"id": self.name, "object": "model", "owned_by": "mllm-assets", "created": self._created_s}]


class WhileWanted:
    """A model that generates as long as its client is there, and within a time.

    Args:
        model: The model.
        config: Of this answer. At the end of the time `max_new_tokens` becomes 0, which the client is told as "length".
        answer_s: Seconds.
    """

    def __init__(self, model: Any, config: GenerationConfig, answer_s: float) -> None:
        self._model, self._config, self._answer_s = model, config, answer_s

    def generate(self, **options: Any) -> Any:
        """Generate, unless the client has gone while others were answered."""
        gone, ends_s = CLIENT_GONE.get(), time.monotonic() + self._answer_s
        raise_if_gone()

        def is_over(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            if is_late := time.monotonic() > ends_s:
                self._config.max_new_tokens = 0
            return torch.full((len(input_ids),), is_late or gone.is_set(), device=input_ids.device)

        with out_of_memory_is_an_error("while a request was answered", FEWER):
            return self._model.generate(**options, stopping_criteria=StoppingCriteriaList([is_over]))  # pyright: ignore[reportArgumentType]


class AnswerManager(GenerateManager):
    """transformers' own generation, within the model's context and up to the request's stop texts.

    transformers passes the processor on where its search for stop texts needs the tokenizer. What runs in the thread
    sees the context variables of the request that it is for.
    """

    def __init__(self, answerer: Answerer, *, answer_s: float) -> None:
        super().__init__()
        self._answerer, self._answer_s = answerer, answer_s

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return super().submit(copy_context().run, fn, *args, **kwargs)

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run something in the thread, to its end also where the one who waits for it is cancelled."""
        return asyncio.shield(super().async_submit(copy_context().run, fn, *args, **kwargs))

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> Any:
        self._fit(inputs, gen_config)
        model, tokenizer = WhileWanted(model, gen_config, self._answer_s), self._answerer.tokenizer
        queue, streamer = super().generate_streaming(model, tokenizer, inputs, gen_config, *args, **kwargs)  # pyright: ignore[reportArgumentType]
        return StoppingQueue(queue, gen_config.stop_strings or ()), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> Any:
        self._fit(inputs, gen_config)
        model, tokenizer = WhileWanted(model, gen_config, self._answer_s), self._answerer.tokenizer
        return await super().generate_non_streaming(model, tokenizer, inputs, gen_config, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    def _fit(self, inputs: Any, config: GenerationConfig) -> None:
        room = self._answerer.room_for_answer(inputs["input_ids"].shape[-1])
        config.max_new_tokens = min(config.max_new_tokens or room, room)


class ChatHandler(ChatCompletionHandler):
    """Chat completions in the turn format of the training, one at a time.

    Pictures are decoded and texts encoded in the thread of generation, when a request's turn has come: those that wait
    hold no more than their bodies, and the event loop is free.

    Args:
        manager: The model.
        generation_state: transformers' own.
        answerer: The same model, which knows where its answers stop.
        answers: Its thread.
        max_new_tokens: Most tokens of an answer, also where a request asks for more.
        limits: Of a request.
    """

    def __init__(
        self,
        manager: OneModel,
        generation_state: GenerationState,
        answerer: Answerer,
        answers: AnswerManager,
        *,
        max_new_tokens: int,
        limits: Limits,
    ) -> None:
        super().__init__(manager, generation_state)
        self._model_name = manager.name
        self._answers, self._turn = answers, asyncio.Lock()
        self._stop_ids = answerer.stop_ids
        self._vocab_size = len(answerer.tokenizer)
        self._control_token = control_token_pattern(answerer.tokenizer)
        self._max_new_tokens, self._limits = max_new_tokens, limits
        self._image_limits = answerer.collator.image_limits

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        asked = checked(body, model_name=self._model_name, vocab_size=self._vocab_size)
        await self._turn.acquire()
        try:
            response = await self._answer(asked, request_id)
        except TemplateError as error:  # such as roles that do not alternate
            raise RequestError("messages", f"The messages do not fit the model's turn format: {error}.") from None
        except DataError as error:
            raise RequestError("messages", str(error)) from None
        except OutOfMemoryError as error:
            raise RequestError(None, str(error), status=503) from None
        finally:  # the thread has ended this request's work before the next one's turn, wherever its client is
            self._answers.async_submit(lambda: None).add_done_callback(lambda _: self._turn.release())
        if isinstance(response, StreamingResponse):
            response.body_iterator = _with_end(response.body_iterator)  # pyright: ignore[reportArgumentType]
            return response
        return _stopped(response, asked["stop"]) if "stop" in asked else response

    async def _answer(self, asked: dict[str, Any], request_id: str) -> Any:
        model, processor = self.model_manager.load_model_and_processor("")
        inputs = await self._answers.async_submit(self._inputs, asked["messages"], model, processor)
        config = self._build_generation_config(asked, model.generation_config)
        options = (request_id, model, processor, self._model_name, inputs, config, self._answers)
        return self._streaming(*options) if asked.get("stream") else await self._non_streaming(*options)  # pyright: ignore[reportArgumentType]

    def _inputs(self, messages: list[Any], model: Any, processor: Any) -> Any:
        chat = self.get_processor_inputs_from_messages(messages, None)
        with out_of_memory_is_an_error("while a request was read", FEWER):
            return processor.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True, tokenize=True
            ).to(model.device)

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        asked_for = body.get("max_completion_tokens") or body.get("max_tokens") or self._max_new_tokens
        config.max_new_tokens = min(asked_for, self._max_new_tokens)
        if body.get("temperature"):
            config.do_sample = True
        elif not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        config.eos_token_id = self._stop_ids
        return config

    def get_processor_inputs_from_messages(self, messages: list[Any], modality: Any) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return messages as processors take them, with images as pictures.

        Raises:
            RequestError: A message cannot be used. Says which and why.
        """
        parts = [parts_of(message, f"messages[{index}]") for index, message in enumerate(messages)]
        require_within(parts, max_chars=self._limits.text_chars, max_images=self._limits.images)
        return [
            {"role": message["role"], "content": [self._part(part, f"messages[{index}]") for part in parts[index]]}
            for index, message in enumerate(messages)
        ]

    def _part(self, part: Any, where: str) -> dict[str, Any]:
        raise_if_gone()
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(text := part.get("text"), str):
            for start in range(0, len(text), STEP):  # a search in thousands of tokens holds up all threads
                if found := self._control_token.search(text, max(0, start - OVERLAP), start + STEP):
                    raise RequestError(where, f"{where}: the text holds {found.group()!r}, which steers the model.")
                raise_if_gone()
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise RequestError(where, f"{where}: the text holds half a character (a lone surrogate).")
            return {"type": "text", "text": text}
        if kind == "image_url":
            address = part.get("image_url")
            url = address.get("url") if isinstance(address, Mapping) else address
            return {"type": "image", "image": picture(url, where, **self._image_limits)}
        raise RequestError(where, f"{where}: parts must be of type text or image_url, got {str(kind)[:40]!r}.")


def raise_if_gone() -> None:
    """End work for a client that has gone."""
    if CLIENT_GONE.get().is_set():
        raise _GenerationCancelled


async def _with_end(parts: AsyncIterator[str]) -> AsyncIterator[str]:
    """The end of a stream that OpenAI's own servers send, and some clients wait for."""
    async with aclosing(parts) as open_parts:  # pyright: ignore[reportArgumentType]
        async for part in open_parts:
            yield part
    yield "data: [DONE]\n\n"


def _stopped(response: JSONResponse, stops: Sequence[str]) -> JSONResponse:
    completion = json.loads(bytes(response.body))
    for choice in completion["choices"]:
        choice["message"]["content"] = before_stop(choice["message"].get("content") or "", stops)
    return JSONResponse(completion)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text, all of it if there is none."""
    found = [index for stop in stops if (index := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


class StoppingQueue:
    """The pieces of a streamed answer up to a stop text, as transformers' serving takes them from its own queue.

    What may be the beginning of a stop text is held back. An error becomes the inside of a JSON string, which is how
    transformers sends it.
    """

    def __init__(self, queue: "asyncio.Queue[Any]", stops: Sequence[str]) -> None:
        self._queue, self._stops, self._ended = queue, stops, False
        self._held, self._ready = "", deque[Any]()

    async def get(self) -> Any:
        """Wait for the next piece; None ends the answer."""
        while not self._ready:
            self._take(await self._queue.get())
        return self._ready.popleft()

    def get_nowait(self) -> Any:
        """Return the next piece.

        Raises:
            asyncio.QueueEmpty: There is none yet.
        """
        while not self._ready:
            self._take(self._queue.get_nowait())
        return self._ready.popleft()

    def _take(self, piece: Any) -> None:
        if type(piece) is str:  # of the answer; reasoning is a class of its own
            self._take_text(piece)
        elif isinstance(piece, _StreamError):
            self._ready.append(_StreamError(json.dumps(piece.msg)[1:-1]))
        else:
            if piece is None and self._held:
                self._ready.append(self._held)
            self._ready.append(piece)

    def _take_text(self, text: str) -> None:
        if self._ended:
            return
        text = self._held + text
        kept = before_stop(text, self._stops)
        self._ended = len(kept) < len(text)
        starts = (n for stop in self._stops for n in range(1, len(stop)) if kept.endswith(stop[:n]))
        end = len(kept) - (0 if self._ended else max(starts, default=0))
        self._held = kept[end:]
        if end:
            self._ready.append(kept[:end])
