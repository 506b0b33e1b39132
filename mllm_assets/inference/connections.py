"""Limits of the server: what all connections, requests, texts and pictures may take of it, each and together."""

import asyncio
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mllm_assets.settings import number

_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Each is the environment variable `MLLM_ASSETS_SERVE_<NAME>`.

    Attributes:
        connections: That are open. Above it the oldest that waits for a request is closed.
        requests: That are being read, wait or are being answered. Above it: 503.
        head_s: Until a request's head has come, and until the next one has, on a connection that stays open.
        body_s: Until its body has come; then 408. As long for the rest of a body that was refused.
        write_s: For which a client may read nothing of what was sent to it.
        answer_s: Of the generation of one answer, which then ends like one of `max_tokens`.
        body_mib: Of one request; then 413.
        bodies_mib: Of all requests that are being read, wait or are being answered; then 503.
        json_values: In a body; then 413.
        text_chars: Of all texts of a request; then 413.
        images: Of a request; then 413.
    """

    connections: int = 256
    requests: int = 64
    head_s: float = 10.0
    body_s: float = 60.0
    write_s: float = 30.0
    answer_s: float = 300.0
    body_mib: int = 32
    bodies_mib: int = 128
    json_values: int = 200_000
    text_chars: int = 2**20
    images: int = 32

    @classmethod
    def from_environment(cls) -> "Limits":
        """The defaults, and what is set otherwise.

        Raises:
            MachineError: A variable is not a number, or below 1. Names it.
        """
        given: dict[str, Any] = {}
        for field in fields(cls):
            name, kind = f"MLLM_ASSETS_SERVE_{field.name.upper()}", type(field.default)
            given[field.name] = number(name, field.default, least=1, kind=kind)  # pyright: ignore[reportArgumentType]
        return cls(**given)


class LimitedConnection(H11Protocol):
    """A connection of uvicorn that ends when its client takes too long, which uvicorn leaves to a proxy."""

    limits = Limits()  # of a server; see `limited`
    _waiting: dict["LimitedConnection", None]  # connections without a request, the oldest first
    _makes_room = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that `pause_writing` is called as soon as anything is not taken
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._wait_for_head()
        if len(self.connections) > self.limits.connections and not self._makes_room:
            # what the older ones have sent is read first: hundreds may be accepted in one turn of the loop
            type(self)._makes_room = True
            self.loop.call_soon(self.loop.call_soon, self._make_room)

    def _make_room(self) -> None:
        type(self)._makes_room = False
        num_open = sum(not connection.transport.is_closing() for connection in self.connections)
        closed = list(islice(self._waiting, max(0, num_open - self.limits.connections)))
        for connection in closed:
            if len(closed) == len(self._waiting):  # all others are being answered
                connection.transport.write(_BUSY)
            connection.transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._wait_for_head()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
        if self.cycle is not None and self.cycle.response_complete:
            self._wait_for_head()

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        if self.transport.is_closing() or self.flow.write_paused:
            return
        self._waiting[self] = None
        rest_comes = self.conn.their_state is h11.SEND_BODY  # of a request that was refused
        wait_s = self.limits.body_s if rest_comes else self.limits.head_s
        self._timer = self.loop.call_later(wait_s, self.transport.close)

    def _stop_waiting(self) -> None:
        self._waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()


def limited(limits: Limits) -> type[LimitedConnection]:
    """The connections of one server: uvicorn makes them from a class."""
    return type("Connection", (LimitedConnection,), {"limits": limits, "_waiting": {}})
