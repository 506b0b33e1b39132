"""transformers' own chat completions for one loaded model: what of a request is passed on, and what is refused.

A request brings its images itself, as `data:` URLs. Nothing in it makes the server open a file, fetch an address, load
another model or render a template of the client's.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from jinja2 import TemplateError
from PIL import Image
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager

from mllm_assets.data.images import open_image
from mllm_assets.inference.answerer import Answerer
from mllm_assets.training.encode import control_token_pattern
from mllm_assets.training.image_files import fit_area

ROLES = ("system", "user", "assistant")
# with these a client would choose the template, and every option of the generation
REFUSED_FIELDS = ("chat_template_kwargs", "generation_config", "tools")


class OneModel(ModelManager):
    """Serves a model that is loaded already, under one name."""

    def __init__(self, name: str, answerer: Answerer, processor: Any) -> None:
        super().__init__(device=str(answerer.device), model_timeout=-1)
        self.force_model = name  # set late: the constructor would load it
        self._loaded = (answerer.model, processor)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # `emoji_sft@v1` is a release here, no revision on the Hub

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self._loaded

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [{"id": self.force_model, "object": "model", "owned_by": "mllm-assets", "created": 0}]


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
        self._stop_ids = answerer.stop_ids
        self._control_token = control_token_pattern(answerer.tokenizer)
        self._max_new_tokens = max_new_tokens
        self._image_limits = image_limits

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        try:
            return await super().handle_request(body, request_id)
        except TemplateError as error:  # such as roles that do not alternate
            raise HTTPException(400, f"The messages do not fit the model's turn format: {error}.") from None

    def _validate_request(self, body: dict[str, Any]) -> None:
        for field in REFUSED_FIELDS:
            if body.get(field) is not None:
                raise HTTPException(400, f"{field} is not supported by this server. Leave it out.")
        super()._validate_request(body)
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise HTTPException(400, "messages must be a list of at least one message.")

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        asked_for = body.get("max_completion_tokens") or body.get("max_tokens") or self._max_new_tokens
        config.max_new_tokens = min(int(asked_for), self._max_new_tokens)
        if body.get("temperature"):
            config.do_sample = True
        elif not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        config.eos_token_id = self._stop_ids
        return config

    def get_processor_inputs_from_messages(self, messages: list[Any], modality: Any) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return messages as processors take them, with images as pictures.

        Raises:
            HTTPException: 400: a message cannot be used. Says which and why.
        """
        return [self._message(message, f"messages[{index}]") for index, message in enumerate(messages)]

    def _message(self, message: Any, where: str) -> dict[str, Any]:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise HTTPException(400, f"{where}: role must be one of {', '.join(ROLES)}.")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts:
            raise HTTPException(400, f"{where}: content must be a text or a list of parts.")
        return {"role": message["role"], "content": [self._part(part, where) for part in parts]}

    def _part(self, part: Any, where: str) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if self._control_token is not None and (found := self._control_token.search(part["text"])):
                raise HTTPException(400, f"{where}: the text holds {found.group()!r}, which steers the model.")
            return {"type": "text", "text": part["text"]}
        if kind == "image_url":
            address = part.get("image_url")
            url = address.get("url") if isinstance(address, Mapping) else address
            return {"type": "image", "image": picture(url, where, **self._image_limits)}
        raise HTTPException(400, f"{where}: parts must be of type text or image_url, got {str(kind)[:40]!r}.")


def picture(url: Any, where: str, **image_limits: int) -> Image.Image:
    """Decode a `data:` URL into an RGB image of an area within the limits, as in training.

    Raises:
        HTTPException: 400: it is another kind of URL, or no image.
    """
    header, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not header.startswith("data:image/") or not header.endswith(";base64") or not comma:
        raise HTTPException(
            400,
            f"{where}: image_url must be a data: URL (data:image/png;base64,...). This server fetches no address and "
            "opens no file.",
        )
    try:
        opened = open_image(base64.b64decode(data, validate=True))
        opened.load()
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise HTTPException(400, f"{where}: the image cannot be read ({type(error).__name__}).") from None
    return fit_area(opened, **image_limits)
