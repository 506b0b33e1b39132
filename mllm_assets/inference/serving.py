"""An OpenAI-compatible server for one model: transformers' own, behind a check of the key."""

import hmac
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException  # FastAPI's own is one
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import AutoProcessor
from transformers.cli.serving.server import build_server

from mllm_assets.errors import ModelError
from mllm_assets.inference.addresses import is_loopback, names_of, url
from mllm_assets.inference.answerer import Answerer
from mllm_assets.inference.chat_handler import ChatHandler, OneModel, OneThread
from mllm_assets.inference.chat_request import RequestError
from mllm_assets.inference.generate import open_model
from mllm_assets.inference.naming import NamedModel
from mllm_assets.inference.turn_format import require_same_format
from mllm_assets.training.processors import ImageTextProcessor

PATHS = {"/v1/chat/completions": "POST", "/v1/models": "GET", "/health": "GET"}  # transformers has more, none is ours
MAX_BODY_BYTES = 32 * 2**20


def serve(
    model: NamedModel,
    listening: socket.socket,
    *,
    host: str,
    api_key: str | None,
    device: str = "auto",
    max_new_tokens: int = 1024,
) -> None:
    """Serve a model until the process is told to stop.

    Args:
        model: What is served, under the name that it has here.
        listening: Where; see `mllm_assets.inference.addresses.listen`.
        host: The address that was asked for.
        api_key: What each request must bring; None for no check.
        device: auto, cuda, mps or cpu.
        max_new_tokens: Most tokens of an answer.

    Raises:
        ModelError: The model cannot be loaded, or its chat template is another than what it was trained in.
        MachineError: The device is not there.
    """
    answerer = open_model(model, device=device)
    app = build_app(model, answerer, host=host, api_key=api_key, max_new_tokens=max_new_tokens)
    address = url(host, listening.getsockname()[1])
    print(f"{model.name} answers on {address}/v1 as model {model.name!r}; Ctrl-C ends it", flush=True)
    config = uvicorn.Config(app, log_level="info", server_header=False, timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listening])


def build_app(
    model: NamedModel, answerer: Answerer, *, host: str, api_key: str | None, max_new_tokens: int = 1024
) -> FastAPI:
    """Build the application around a loaded model.

    Raises:
        ModelError: The model's chat template is another than what it was trained in.
    """
    processor = _whole_processor(answerer)
    require_same_format(answerer.encoder, processor, str(model.directory))
    manager, state = OneModel(model.name, model.directory, answerer, processor), OneThread(answerer)
    limits = {"max_pixels": model.image_max_pixels, "min_pixels": model.image_min_pixels}
    chat = ChatHandler(
        manager, answerer, state, max_new_tokens=max_new_tokens, image_limits=limits
    )  # fmt: skip
    unreachable: Any = None  # see PATHS
    app = build_server(manager, chat, unreachable, unreachable, unreachable, unreachable, state)
    app.add_exception_handler(HTTPException, _refused)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(RequestValidationError, _not_an_object)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(Guard, api_key=api_key)
    if is_loopback(host):  # or a page that a browser shows could ask by a name that it points to this machine
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=names_of(host))
    return app


class Guard:
    """Lets through what has the key, is not too long, and is one of `PATHS`."""

    def __init__(self, app: ASGIApp, *, api_key: str | None) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode() if api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (refusal := self._refusal(scope)) is None:
            await self._app(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        if scope["type"] != "http" or PATHS.get(scope["path"]) != scope["method"]:
            return _problem(404, f"Not here. This server has {', '.join(PATHS)}.")
        headers = dict(scope["headers"])
        if self._expected is not None and scope["path"] != "/health":
            if not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
                return _problem(401, "Wrong or missing API key. Send the server's MLLM_ASSETS_API_KEY as bearer token.")
        if scope["method"] == "POST":
            length = headers.get(b"content-length", b"")
            if not length.isdigit():
                return _problem(411, "The request must say its Content-Length.")
            if int(length) > MAX_BODY_BYTES:
                return _problem(
                    413, f"The request is too long: at most {MAX_BODY_BYTES // 2**20} MiB. Shrink the images."
                )
        return None


def _problem(status: int, message: str, param: str | None = None) -> JSONResponse:
    """An error as OpenAI's clients read it; `param` is the field that must change."""
    kinds = {401: "authentication_error", 500: "server_error"}
    error = {"message": message, "type": kinds.get(status, "invalid_request_error"), "param": param, "code": status}
    return JSONResponse({"error": error}, status_code=status)


async def _refused(_: Request, error: HTTPException) -> JSONResponse:
    param = error.param if isinstance(error, RequestError) else None
    return _problem(error.status_code, str(error.detail), param)


async def _not_an_object(_: Request, __: Exception) -> JSONResponse:
    return _problem(400, "The request's body must be a JSON object, sent with Content-Type: application/json.")


async def _failed(_: Request, __: Exception) -> JSONResponse:
    return _problem(500, "The server failed; its log says why.")


def _whole_processor(answerer: Answerer) -> Any:
    processor = answerer.processor
    if not isinstance(processor, ImageTextProcessor):
        return processor
    try:
        return AutoProcessor.from_pretrained(processor.directory, local_files_only=True, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        raise ModelError(
            f"The processor in {processor.directory} cannot be loaded whole, which serving needs ({error}). Install "
            "torchvision, or ask the model with `mllm-assets generate`."
        ) from error
