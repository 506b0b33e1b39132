"""transformers' own chat completions for one loaded model, in the turn format that it was trained in."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState

from mllm_assets.errors import DataError
from mllm_assets.inference.answerer import Answerer
from mllm_assets.inference.chat_request import RequestError, checked, parts_of, picture
from mllm_assets.inference.stop_texts import StoppingQueue, before_stop
from mllm_assets.training.turns import control_token_pattern


class OneModel(ModelManager):
    """Serves a model that is loaded already, under one name."""

    def __init__(self, name: str, directory: Path, answerer: Answerer, processor: Any) -> None:
        super().__init__(device=str(answerer.device), model_timeout=-1)
        self.name = self.force_model = name  # set late: the constructor would load it
        self._created_s = int(directory.stat().st_mtime)
        self._loaded = (answerer.model, processor)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # `emoji_sft@v1` is a release here, no revision on the Hub

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self._loaded

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [{"id": self.name, "object": "model", "owned_by": "mllm-assets", "created": self._created_s}]


class OneThread(GenerationState):
    """Hands out the one manager that knows where the model's context ends."""

    def __init__(self, answerer: Answerer) -> None:
        super().__init__()
        self._manager = AnswerManager(answerer)

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self._manager


class AnswerManager(GenerateManager):
    """transformers' own generation, within the model's context and up to the request's stop texts.

    transformers passes the processor on where its search for stop texts needs the tokenizer.
    """

    def __init__(self, answerer: Answerer) -> None:
        super().__init__()
        self._answerer = answerer

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> Any:
        self._fit(inputs, gen_config)
        tokenizer = self._answerer.tokenizer
        queue, streamer = super().generate_streaming(model, tokenizer, inputs, gen_config, *args, **kwargs)
        return StoppingQueue(queue, gen_config.stop_strings or ()), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> Any:
        self._fit(inputs, gen_config)
        tokenizer = self._answerer.tokenizer
        return await super().generate_non_streaming(model, tokenizer, inputs, gen_config, *args, **kwargs)

    def _fit(self, inputs: Any, config: GenerationConfig) -> None:
        room = self._answerer.room_for_answer(inputs["input_ids"].shape[-1])
        config.max_new_tokens = min(config.max_new_tokens or room, room)


class ChatHandler(ChatCompletionHandler):
    """Chat completions in the turn format that the model was trained in.

    Args:
        manager: The model.
        answerer: The same model, which knows where its answers stop.
        generation_state: transformers' own.
        max_new_tokens: Most tokens of an answer, also where a request asks for more.
        image_limits: `max_pixels` and `min_pixels`, the area that images are first brought to, as in training.
    """

    def __init__(
        self,
        manager: OneModel,
        answerer: Answerer,
        generation_state: Any,
        *,
        max_new_tokens: int,
        image_limits: Mapping[str, int],
    ) -> None:
        super().__init__(manager, generation_state)
        self._model_name = manager.name
        self._stop_ids = answerer.stop_ids
        self._vocab_size = len(answerer.tokenizer)
        self._control_token = control_token_pattern(answerer.tokenizer)
        self._max_new_tokens = max_new_tokens
        self._image_limits = image_limits

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        asked = checked(body, model_name=self._model_name, vocab_size=self._vocab_size)
        try:
            response = await super().handle_request(asked, request_id)
        except TemplateError as error:  # such as roles that do not alternate
            raise RequestError("messages", f"The messages do not fit the model's turn format: {error}.") from None
        except DataError as error:
            raise RequestError("messages", str(error)) from None
        if isinstance(response, StreamingResponse):
            response.body_iterator = _with_end(response.body_iterator)  # pyright: ignore[reportArgumentType]
            return response
        return _stopped(response, asked["stop"]) if "stop" in asked else response

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
        result = []
        for index, message in enumerate(messages):
            where = f"messages[{index}]"
            parts = [self._part(part, where) for part in parts_of(message, where)]
            result.append({"role": message["role"], "content": parts})
        return result

    def _part(self, part: Any, where: str) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if found := self._control_token.search(part["text"]):
                raise RequestError(where, f"{where}: the text holds {found.group()!r}, which steers the model.")
            return {"type": "text", "text": part["text"]}
        if kind == "image_url":
            address = part.get("image_url")
            url = address.get("url") if isinstance(address, Mapping) else address
            return {"type": "image", "image": picture(url, where, **self._image_limits)}
        raise RequestError(where, f"{where}: parts must be of type text or image_url, got {str(kind)[:40]!r}.")


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
