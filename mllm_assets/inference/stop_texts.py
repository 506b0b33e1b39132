"""Texts at which an answer ends, as OpenAI's `stop` asks: neither they nor what follows them is said."""

import asyncio
import json
from collections import deque
from collections.abc import Sequence
from typing import Any

from transformers.cli.serving.utils import _StreamError


def before_stop(text: str, stops: Sequence[str]) -> str:
    """What stands before the first of the stop texts, all where there is none."""
    found = [index for stop in stops if (index := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


class StopTexts:
    """Cuts a text that comes in pieces, and holds back what may be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self._ended = stops, "", False

    def feed(self, text: str) -> str:
        """Return what is certain to be said."""
        if self._ended:
            return ""
        text = self._held + text
        said = before_stop(text, self._stops)
        if len(said) < len(text):
            self._ended, self._held = True, ""
            return said
        length = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - length :]
        return text[: len(text) - length]

    def rest(self) -> str:
        """Return what was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


class StoppingQueue:
    """The pieces of a streamed answer up to a stop text, as transformers' serving takes them from its own queue.

    An error becomes the inside of a JSON string, which is how transformers sends it.
    """

    def __init__(self, queue: "asyncio.Queue[Any]", stops: Sequence[str]) -> None:
        self._queue, self._texts = queue, StopTexts(stops)
        self._ready: deque[Any] = deque()

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
            self._say(self._texts.feed(piece))
        elif isinstance(piece, _StreamError):
            self._ready.append(_StreamError(json.dumps(piece.msg)[1:-1]))
        else:
            if piece is None:
                self._say(self._texts.rest())
            self._ready.append(piece)

    def _say(self, text: str) -> None:
        if text:
            self._ready.append(text)
