"""Connections whose clients send or read slowly, or nothing, on uvicorn itself."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
import uvicorn  # noqa: E402

from mllm_assets.inference.connections import Limits, limited  # noqa: E402

HALF_A_HEAD = b"GET / HTTP/1.1\r\nHost: a\r\nX-Half: "
REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
NUM_ANSWER_BYTES = 32 * 2**20
Connect = Callable[[bytes], socket.socket]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers without reading the request's body: a POST with two bytes, all else with many.

    `/slow` holds up the loop, as much work at once does.
    """
    if scope["path"] == "/slow":
        time.sleep(1)
    body = b"ok" if scope["method"] == "POST" else bytes(NUM_ANSWER_BYTES)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def served(limits: Limits) -> Iterator[tuple[Connect, set[Any]]]:
    """A function that connects and sends, and the connections that the server has."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        config = uvicorn.Config(app, http=limited(limits), ws="none", loop="asyncio", lifespan="off", log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        address = listening.getsockname()

        def connect(sent: bytes) -> socket.socket:
            connection = stack.enter_context(socket.create_connection(address, timeout=30))
            connection.sendall(sent)
            return connection

        try:
            yield connect, server.server_state.connections
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def read_all(connection: socket.socket) -> int:
    """The number of bytes until the server closes the connection, also with an error."""
    num_bytes = 0
    try:
        while part := connection.recv(2**20):
            num_bytes += len(part)
    except ConnectionError:
        pass
    return num_bytes


def trickle(connection: socket.socket) -> bool:
    """Send a byte now and then, and say whether the server ended that."""
    for _ in range(100):
        time.sleep(0.05)
        try:
            connection.sendall(b"x")
        except OSError:
            return True
    return False


def test_a_head_that_does_not_come_is_not_waited_for_nor_one_that_trickles() -> None:
    """Three hundred half-sent requests stayed open for as long as their senders liked."""
    with served(Limits(head_s=0.5)) as (connect, _):
        silent = [connect(HALF_A_HEAD) for _ in range(20)] + [connect(b"")]
        assert trickle(connect(HALF_A_HEAD))
        assert [read_all(connection) for connection in silent] == [0] * 21


def test_the_rest_of_a_body_that_was_refused_is_not_waited_for() -> None:
    with served(Limits(head_s=60, body_s=0.5)) as (connect, _):
        connection = connect(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")
        assert trickle(connection)


def test_above_the_limit_the_one_that_waited_longest_makes_room() -> None:
    with served(Limits(connections=5, head_s=60)) as (connect, connections):
        half_open = [connect(HALF_A_HEAD) for _ in range(12)]
        assert read_all(connect(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")) > 2
        assert [read_all(connection) for connection in half_open[:7]] == [0] * 7
        assert 0 < len(connections) <= 5


def test_a_request_is_read_before_its_connection_makes_room() -> None:
    """Of 300 connections that came together with `/health` the oldest was closed unread: `/health` itself."""
    with served(Limits(connections=5, head_s=60)) as (connect, _):
        connect(b"POST /slow HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        time.sleep(0.2)
        asked = connect(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        half_open = [connect(HALF_A_HEAD) for _ in range(12)]
        assert read_all(asked) > 2
        assert [read_all(connection) for connection in half_open[:7]] == [0] * 7


def test_a_connection_that_is_being_answered_is_not_closed_for_another() -> None:
    with served(Limits(connections=2, head_s=60)) as (connect, _):
        answered = [connect(REQUEST) for _ in range(2)]
        for connection in answered:
            assert connection.recv(1)
        assert connect(b"").recv(2**10).startswith(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\n")
        for connection in answered:
            received = 1
            while received < NUM_ANSWER_BYTES:
                received += len(connection.recv(2**20))


def test_a_client_that_reads_nothing_is_let_go() -> None:
    with served(Limits(write_s=0.5, head_s=60)) as (connect, connections):
        connection = connect(REQUEST)
        assert connection.recv(1)
        for _ in range(200):
            if not connections:
                break
            time.sleep(0.05)
        assert not connections
        assert read_all(connection) < NUM_ANSWER_BYTES
