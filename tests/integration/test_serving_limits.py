"""What those who ask the server badly cost those who ask it well: `mllm-assets serve` with small limits."""

import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
from tests.integration.model_server import KEY, MODEL, Server, data_url, question  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.slow]
IMAGE = MODEL.parent / "data" / "images" / "emoji_000.png"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
ENDLESS = {"temperature": 0, "max_tokens": 100_000, "logit_bias": {"1": -100, "106": -100}}  # never ends its turn
HALF_A_HEAD = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half: "


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(
        *("--max-new-tokens", "100000"), connections=20, requests=4, head_s=3, answer_s=5, text_chars=60_000, images=3
    )
    yield server
    server.process.kill()
    server.process.communicate()


def connect(server: Server, *, sent: bytes, timeout_s: float = 30) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=timeout_s)
    connection.sendall(sent)
    return connection


def asked(server: Server, **options: Any) -> bytes:
    """A whole request for a completion, as it goes over the wire."""
    body = json.dumps({"model": server.model, "messages": question("What is this?", data_url(IMAGE)), **options})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def is_closed(connection: socket.socket) -> bool:
    """Whether the server closes it within its time-out, also before it has read all that was sent."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def is_healthy(server: Server) -> bool:
    return httpx.get(f"{server.url}/health", timeout=30).json() == {"status": "ok"}


def test_half_sent_heads_are_closed_and_leave_room_for_others(server: Server) -> None:
    """Three hundred stayed open for as long as their senders liked."""
    connections = [connect(server, sent=HALF_A_HEAD) for _ in range(40)]
    assert is_healthy(server), "twice as many as may be open"
    assert [is_closed(connection) for connection in connections] == [True] * 40


def test_answers_that_nobody_waits_for_any_more_end(server: Server) -> None:
    """Fifty kept the next client waiting for a minute."""
    for turn in range(12):  # of three each: one is being answered, two wait
        for stream in (False, True, False):
            connect(server, sent=asked(server, **ENDLESS, stream=stream)).close()
        if turn % 2:
            with connect(server, sent=asked(server, **ENDLESS, stream=True)) as connection:
                assert connection.recv(1)
    started = time.monotonic()
    while (answer := ask_plainly(server)).status_code == 503:
        time.sleep(0.1)
    assert answer.status_code == 200
    assert time.monotonic() - started < 100, "forty answers of 5 s each were begun"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_after_its_seconds_as_after_its_tokens(server: Server, stream: bool) -> None:
    found = server.client().chat.completions.create(
        model=server.model, messages=question("What?"), stream=stream, **ENDLESS
    )
    last = list(found)[-1] if stream else found
    assert last.choices[0].finish_reason == "length" and 0 < last.usage.completion_tokens < 8000


def test_those_above_the_limit_of_requests_are_told_when_to_come_again(server: Server) -> None:
    connections = [connect(server, sent=asked(server, **ENDLESS)) for _ in range(4)]
    while (answer := ask_plainly(server)).status_code == 200:  # until all four have been read
        pass
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "5"
    assert answer.json()["error"]["message"] == "The server is busy with other requests. Send it again in some seconds."
    assert is_healthy(server)
    for connection in connections:
        connection.close()


def ask_plainly(server: Server) -> httpx.Response:
    body = {"messages": question("What?"), "max_tokens": 1}
    return httpx.post(f"{server.url}/v1/chat/completions", headers=AUTHORIZED, json=body, timeout=500)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (question("?", *[data_url(IMAGE)] * 4), "The messages hold 4 images: at most 3."),
        (question("x" * 40_000) * 2, "The messages hold 80,000 characters: at most 60,000."),
    ],
)
def test_what_a_request_holds_has_a_limit_together(server: Server, messages: list[Any], message: str) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        server.client().chat.completions.create(model=server.model, messages=messages, max_tokens=1)
    assert raised.value.status_code == 413 and message in str(raised.value)


def test_health_is_told_while_pictures_are_decoded(server: Server) -> None:
    """The event loop decoded them, for most of a minute."""
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").resize((9000, 9000)).save(buffer, "JPEG")
    messages = question("What?", *[data_url(buffer.getvalue())] * 3)
    statuses: list[Any] = []

    def ask() -> None:
        started = time.monotonic()
        found = server.client().chat.completions.create(model=server.model, messages=messages, max_tokens=1)
        statuses.append((found.usage.completion_tokens, time.monotonic() - started))

    thread = threading.Thread(target=ask)
    thread.start()
    slowest_s = 0.0
    while thread.is_alive():
        started = time.monotonic()
        assert is_healthy(server)
        slowest_s = max(slowest_s, time.monotonic() - started)
        time.sleep(0.02)
    [(num_tokens, asked_s)] = statuses
    assert num_tokens <= 1 and slowest_s < asked_s / 2
