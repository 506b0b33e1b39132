"""The items of a JSON list one by one, however long the list is.

`ijson` streams too, but of two equal keys it keeps the last, its C parser makes "?" of half a character and refuses
integers of more than 64 bits: all of them must be seen here, so the standard decoder parses item by item.
"""

import json
import re
from collections.abc import Iterator
from io import TextIOBase
from pathlib import Path
from typing import Any, NoReturn

from mllm_assets.data.json_text import LIMITS, JsonLimits, check_size, decode, read_text
from mllm_assets.errors import DataError

CHUNK_CHARS = 2**18
_SPACE = re.compile(r"[ \t\r\n]*")


def list_items(path: Path, limits: JsonLimits = LIMITS) -> Iterator[Any]:
    """The items of a file that is one JSON list; one item is in memory at a time.

    Raises:
        DataError: Too large, not UTF-8, no list, or as `json_text.decode`; after the items before the fault.
        OSError: Missing, or not a file.
    """
    check_size(path, limits)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _Items(file)
        return
    except (ValueError, RecursionError):  # a fault, or no list: parsed as a whole it is named with its line
        pass
    value = decode(read_text(path, limits), path, 1)
    raise DataError(f"{path}: expected a list of rows, got {type(value).__name__}. Put the rows into one JSON list.")


class _Items:
    """Parses item by item from a window of the text; raises `ValueError` where it is no list."""

    def __init__(self, file: TextIOBase) -> None:
        self._file = file
        self._window, self._at = "", 0
        self._decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refused)

    def __iter__(self) -> Iterator[Any]:
        self._take("[")
        if self._peek() != "]":
            yield self._item()
            while self._peek() != "]":
                self._take(",")
                yield self._item()
        self._take("]")
        if self._peek():
            raise ValueError("text after the list")

    def _peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            match = _SPACE.match(self._window, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._window):
                return self._window[self._at]
            if not self._more():
                return ""

    def _take(self, expected: str) -> None:
        if self._peek() != expected:
            raise ValueError(f"no {expected}")
        self._at += 1

    def _item(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            match = _SPACE.match(self._window, end)
            if match and self._window[match.end() : match.end() + 1] in (",", "]"):
                self._at = end
                return value
            if not self._more():  # of 1.5 a window may hold "1." only
                raise ValueError("the list does not go on")

    def _more(self) -> bool:
        """Read on, twice as much as is waiting: an item of many chunks is not parsed anew for each."""
        part = self._file.read(max(CHUNK_CHARS, len(self._window) - self._at))
        self._window, self._at = self._window[self._at :] + part, 0
        return bool(part)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
