"""What all requests together may hold, and how long a body may take to come."""

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from mllm_assets.errors import MachineError  # noqa: E402
from mllm_assets.inference import chat_request, serving  # noqa: E402
from mllm_assets.inference.chat_handler import CLIENT_GONE  # noqa: E402
from mllm_assets.inference.connections import Limits  # noqa: E402

pytestmark = pytest.mark.attack("HTTP")


class App:
    """Answers what it is sent once it is told to."""

    def __init__(self) -> None:
        self.go, self.bodies = asyncio.Event(), []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class Client:
    """Sends a request in parts; `leave` closes its connection."""

    def __init__(self, guard: serving.Guard, declared: int, *parts: bytes) -> None:
        self._guard, self._gone = guard, asyncio.Event()
        self._messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        if sum(map(len, parts)) == declared:
            self._messages[-1]["more_body"] = False
        headers = [(b"content-length", str(declared).encode())]
        self._scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
        self.sent: list[Any] = []

    def leave(self) -> None:
        self._gone.set()

    async def ask(self) -> int:
        await self._guard(self._scope, self._receive, self._send)
        return self.sent[0]["status"] if self.sent else 0

    async def _receive(self) -> Any:
        if not self._messages:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        return self._messages.pop(0)

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


def test_bodies_have_a_limit_together_which_is_given_back() -> None:
    """Forty bodies of 31 MiB took 3.6 GB."""

    async def run() -> None:
        guard = serving.Guard(app := App(), api_key=None, limits=Limits(bodies_mib=2))
        held = [asyncio.create_task(Client(guard, 2**20, bytes(2**19), bytes(2**19)).ask()) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert await Client(guard, 4, b"abcd").ask() == 503
        app.go.set()
        assert await asyncio.gather(*held) == [200, 200] and app.bodies == [bytes(2**20)] * 2
        assert await Client(guard, 2**21, bytes(2**21)).ask() == 200

    asyncio.run(run())


def test_requests_that_wait_have_a_limit_together_and_those_above_it_hear_when_to_come_again() -> None:
    async def run() -> None:
        guard = serving.Guard(app := App(), api_key=None, limits=Limits(requests=3))
        held = [asyncio.create_task(Client(guard, 4, b"abcd").ask()) for _ in range(3)]
        await asyncio.sleep(0.01)
        refused = Client(guard, 4, b"abcd")
        assert await refused.ask() == 503
        assert dict(refused.sent[0]["headers"])[b"retry-after"] == b"5"
        app.go.set()
        assert await asyncio.gather(*held) == [200] * 3 and await Client(guard, 4, b"abcd").ask() == 200

    asyncio.run(run())


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    """Hundreds of half-sent requests stayed open for as long as their senders liked."""

    async def run() -> None:
        guard = serving.Guard(app := App(), api_key=None, limits=Limits(body_s=0.05, requests=1))
        assert await Client(guard, 10, b"half").ask() == 408
        app.go.set()
        assert await Client(guard, 10, bytes(10)).ask() == 200, "its room was given back"

    asyncio.run(run())


def test_an_application_is_told_and_ended_when_its_client_goes() -> None:
    async def run() -> None:
        seen: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append(CLIENT_GONE.get())
            try:
                await asyncio.Event().wait()
            finally:
                seen.append("ended")

        client = Client(serving.Guard(app, api_key=None, limits=Limits()), 4, b"abcd")
        asking = asyncio.create_task(client.ask())
        await asyncio.sleep(0.01)
        assert len(seen) == 1 and not seen[0].is_set()
        client.leave()
        assert await asyncio.wait_for(asking, 5) == 0
        await asyncio.sleep(0)
        assert seen[0].is_set() and seen[1:] == ["ended"]

    asyncio.run(run())


def test_a_body_of_millions_of_values_is_refused_before_it_is_read_as_json() -> None:
    """Reading it holds up all threads for seconds, and an object takes twenty times the bytes of its text."""

    async def run() -> None:
        app = App()
        app.go.set()
        guard = serving.Guard(app, api_key=None, limits=Limits(json_values=1000))
        body = b"[" + b"{}," * 1000 + b"{}]"
        assert await Client(guard, len(body), body).ask() == 413 and not app.bodies
        assert await Client(guard, 12, b'["1, 2", {}]').ask() == 200

    asyncio.run(run())


def test_each_limit_is_a_variable_and_a_wrong_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_ASSETS_SERVE_CONNECTIONS", "12")
    monkeypatch.setenv("MLLM_ASSETS_SERVE_HEAD_S", "2.5")
    assert Limits.from_environment() == Limits(connections=12, head_s=2.5)
    monkeypatch.setenv("MLLM_ASSETS_SERVE_IMAGES", "many")
    with pytest.raises(MachineError, match="MLLM_ASSETS_SERVE_IMAGES is 'many': expected a whole number of at least 1"):
        Limits.from_environment()


def test_what_cannot_be_written_or_counted_is_a_sentence_too() -> None:
    """Half a character in a field's name, a letter in base64 and 5,000 digits of a length were answered with 500."""
    body = {"messages": [{"role": "user", "content": "x"}], "\ud83d": 1}
    with pytest.raises(chat_request.RequestError) as caught:
        chat_request.checked(body, model_name="m", vocab_size=9)
    assert (
        json.loads(bytes(serving._problem(400, caught.value.detail, caught.value.param).body))["error"]["code"] == 400
    )
    with pytest.raises(chat_request.RequestError, match="the image is not base64"):
        chat_request.picture("data:image/png;base64,\u00e9\ud83d", "messages[0]")

    async def run() -> None:
        guard = serving.Guard(App(), api_key=None, limits=Limits())
        client = Client(guard, 4, b"abcd")
        client._scope["headers"] = [(b"content-length", b"9" * 5000)]
        assert await client.ask() == 413

    asyncio.run(run())


@pytest.mark.parametrize("stop", ["x" * 100_000, ["ab", "x" * 129]], ids=["one", "in a list"])
def test_a_text_to_stop_at_has_a_length(stop: Any) -> None:
    """Of 100,000 characters the search was built for half a minute, while everybody waited."""
    body = {"messages": [{"role": "user", "content": "x"}], "stop": stop}
    with pytest.raises(chat_request.RequestError, match="128 characters"):
        chat_request.checked(body, model_name="m", vocab_size=9)
