"""An OpenAI-compatible server for one model: transformers' own, behind a check of the key."""

import asyncio
import gc
import hmac
import socket
import threading
from collections.abc import Mapping
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException  # FastAPI's own is one
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import AutoProcessor
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from mllm_assets.errors import ModelError
from mllm_assets.inference.addresses import is_loopback, names_of, url
from mllm_assets.inference.answerer import Answerer
from mllm_assets.inference.chat_handler import CLIENT_GONE, AnswerManager, ChatHandler, OneModel
from mllm_assets.inference.chat_request import RequestError, require_same_format
from mllm_assets.inference.connections import Limits, limited
from mllm_assets.inference.generate import open_model
from mllm_assets.training.models.load import ImageTextProcessor
from mllm_assets.training.runs.models import NamedModel

PATHS = {"/v1/chat/completions": "POST", "/v1/models": "GET", "/health": "GET"}  # not all of transformers' own
MIB = 2**20
MAX_LENGTH_DIGITS = 15


def serve(
    model: NamedModel,
    listening: socket.socket,
    *,
    host: str,
    api_key: str | None,
    device: str = "auto",
    max_new_tokens: int = 1024,
) -> None:
    """Serve a model under its name until the process is stopped; each request must have the `api_key`, if any.

    Raises:
        ModelError: The model cannot be loaded, or its chat template is another than what it was trained in.
        MachineError: The device is not available, or a limit (see `Limits`) is not a number.
    """
    limits = Limits.from_environment()
    answerer = open_model(model, device=device)
    app = build_app(model, answerer, host=host, api_key=api_key, max_new_tokens=max_new_tokens, limits=limits)
    gc.collect()
    gc.freeze()  # or a collection would look at all that the libraries loaded, while everybody waits for a second
    address = url(host, listening.getsockname()[1])
    print(f"{model.name} answers on {address}/v1 as model {model.name!r}; Ctrl-C ends it", flush=True)
    config = uvicorn.Config(
        app,
        http=limited(limits),
        ws="none",
        loop="asyncio",  # uvloop reads megabytes of one connection before it looks at the next
        log_level="info",
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[listening])


def build_app(
    model: NamedModel,
    answerer: Answerer,
    *,
    host: str,
    api_key: str | None,
    max_new_tokens: int,
    limits: Limits,
) -> FastAPI:
    """Build the application around a loaded model.

    Raises:
        ModelError: The model's chat template is another than what it was trained in.
    """
    processor = _complete_processor(answerer)
    require_same_format(answerer.encoder, processor, str(model.directory))
    manager, state = OneModel(model.name, model.directory, answerer, processor), GenerationState()
    answers = AnswerManager(answerer, answer_s=limits.answer_s)
    chat = ChatHandler(manager, state, answerer, answers, max_new_tokens=max_new_tokens, limits=limits)
    unreachable: Any = None  # see PATHS
    app = build_server(manager, chat, unreachable, unreachable, unreachable, unreachable, state)
    app.add_exception_handler(HTTPException, _refused)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(RequestValidationError, _not_an_object)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(Guard, api_key=api_key, limits=limits)
    if is_loopback(host):  # or a foreign web page could send requests by a name that it points to this machine
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=names_of(host))
    return app


class Guard:
    """Passes on requests for one of `PATHS` that have the key and whose body arrives in time and fits in memory.

    The rest of the application is cancelled when the client goes.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._expected = f"Bearer {api_key}".encode() if api_key is not None else None
        self._num_bytes = self._num_requests = 0
        self._large = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif (refusal := self._refusal(scope)) is not None:
            await refusal(scope, receive, send)
        elif scope["method"] == "POST":
            await self._with_body(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = int(dict(scope["headers"])[b"content-length"])
        is_full = self._num_bytes + num_bytes > self._limits.bodies_mib * MIB
        if is_full or self._num_requests >= self._limits.requests:
            message = "The server is busy with other requests. Send it again in some seconds."
            # the connection stays: the client reads this once it has sent its body, which is dropped as it comes
            await _problem(503, message, headers={"Retry-After": "5"})(scope, receive, send)
            return
        self._num_bytes += num_bytes
        self._num_requests += 1
        try:
            if body := await self._read(scope, receive, send):
                await self._answer(body, scope, receive, send)
        finally:
            self._num_bytes -= num_bytes
            self._num_requests -= 1

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> list[Message]:
        """The body as one message, nothing where it was refused or its client went."""
        body, num_values, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(self._limits.body_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return []
                    part, more = message["body"], message.get("more_body", False)
                    body += part
                    num_values += sum(map(part.count, (b",", b"[", b"{")))
                    if num_values > self._limits.json_values:
                        problem = f"The request has more than {self._limits.json_values:,} values. Shorten it."
                        await _problem(413, problem)(scope, receive, send)
                        return []
        except TimeoutError:
            problem = f"The request's body did not come within {self._limits.body_s:g} s."
            await _problem(408, problem, headers={"Connection": "close"})(scope, receive, send)
            return []
        return [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def _answer(self, body: list[Message], scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.ensure_future(receive())  # ends when the client goes, or has its answer

        async def receive_body() -> Message:
            if not body:
                return await asyncio.shield(leaving)
            if len(body[0]["body"]) > MIB:  # it is then read as JSON at once; other connections come between two such
                async with self._large:
                    await asyncio.sleep(0.01)
            return body.pop()

        CLIENT_GONE.set(gone := threading.Event())
        answering = asyncio.create_task(self._app(scope, receive_body, send))  # pyright: ignore[reportArgumentType]
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            gone.set()
            answering.cancel()
            leaving.cancel()

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
            if len(length) > MAX_LENGTH_DIGITS or int(length) > self._limits.body_mib * MIB:
                return _problem(
                    413, f"The request is too long: at most {self._limits.body_mib} MiB. Shrink the images."
                )
        return None


def _problem(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error as OpenAI's clients read it; `param` is the field that must change."""
    kinds = {401: "authentication_error", 500: "server_error", 503: "server_error"}
    error = {
        "message": _whole_characters(message),
        "type": kinds.get(status, "invalid_request_error"),
        "param": param and _whole_characters(param),
        "code": status,
    }
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def _whole_characters(text: str) -> str:
    return text.encode(errors="replace").decode()


async def _refused(_: Request, error: HTTPException) -> JSONResponse:
    param = error.param if isinstance(error, RequestError) else None
    return _problem(error.status_code, str(error.detail), param)


async def _not_an_object(_: Request, __: Exception) -> JSONResponse:
    return _problem(400, "The request's body must be a JSON object, sent with Content-Type: application/json.")


async def _failed(_: Request, __: Exception) -> JSONResponse:
    return _problem(500, "The server failed; its log says why.")


def _complete_processor(answerer: Answerer) -> Any:
    processor = answerer.processor
    if not isinstance(processor, ImageTextProcessor):
        return processor
    try:
        return AutoProcessor.from_pretrained(processor.directory, local_files_only=True, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        raise ModelError(
            f"The processor in {processor.directory} cannot be loaded completely, which serving needs ({error}). "
            "Install torchvision, or ask the model with `mllm-assets generate`."
        ) from error
