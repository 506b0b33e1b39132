"""A model that is served on this machine for a program that asks it, with a record of what it was asked and said."""

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn

from mllm_assets.errors import MachineError
from mllm_assets.inference.addresses import listen, url
from mllm_assets.inference.answerer import Answerer
from mllm_assets.inference.connections import Limits, limited
from mllm_assets.inference.recorder import Exchange, Recorder
from mllm_assets.inference.serving import build_app
from mllm_assets.training.runs.models import NamedModel

HOST = "127.0.0.1"
END_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedServer:
    """Where a model is reached, by whom, and what it was asked, in order."""

    address: str
    api_key: str
    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def num_answered(self) -> int:
        return sum(one.answer is not None for one in self.exchanges)


@contextmanager
def recorded_server(model: NamedModel, answerer: Answerer, *, max_new_tokens: int) -> Iterator[RecordedServer]:
    """Serve a loaded model on a free port of this machine while the block runs, to who knows a key made for it.

    Raises:
        ModelError: Its chat template is another than what it was trained in.
        MachineError: The server does not start.
    """
    limits = Limits.from_environment()
    with listen(HOST, 0) as listening:
        address, key = url(HOST, listening.getsockname()[1]), secrets.token_urlsafe(24)
        serving = RecordedServer(address=address, api_key=key)
        app = build_app(model, answerer, host=HOST, api_key=key, max_new_tokens=max_new_tokens, limits=limits)
        app.add_middleware(Recorder, exchanges=serving.exchanges)
        config = uvicorn.Config(
            app, http=limited(limits), ws="none", loop="asyncio", log_config=None, log_level="warning",
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="server", daemon=True)
        thread.start()
        try:
            _wait_until_started(server, thread)
            yield serving
        finally:
            server.should_exit = True
            thread.join(END_S)


def _wait_until_started(server: uvicorn.Server, thread: threading.Thread) -> None:
    ended = threading.Event()
    while not server.started:
        if not thread.is_alive():
            raise MachineError("The server that lmms-eval asks did not start. Its message is above.")
        ended.wait(0.02)
