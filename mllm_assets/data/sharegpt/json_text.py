"""Read untrusted JSON: strictly, within size limits, with the file and line of what is wrong."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import TextIOBase
from pathlib import Path
from typing import Any

from mllm_assets.errors import DataError

BOM = b"\xef\xbb\xbf"
CHUNK_CHARS = 2**18
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonLimits:
    """Sizes above which a file or row is refused before it is in memory; parsed, it takes 8 to 20 times that."""

    max_file_bytes: int = 512 * 2**20  # of a file that is read at once
    max_line_bytes: int = 16 * 2**20  # of a row: it is in memory as a whole


LIMITS = JsonLimits()


def read_text(path: Path, limits: JsonLimits = LIMITS) -> str:
    """The text of a UTF-8 file; a byte order mark is skipped.

    Raises:
        DataError: Too large, or not UTF-8.
        OSError: Missing, or not a file.
    """
    check_size(path, limits)
    return _as_text(path.read_bytes(), path, 0)


def check_size(path: Path, limits: JsonLimits) -> None:
    """Raise DataError for a file that is too large to be in memory as a whole."""
    num_bytes = path.stat().st_size
    if num_bytes > limits.max_file_bytes:
        raise DataError(
            f"{path} has {num_bytes:,} bytes, expected at most {limits.max_file_bytes:,} of a file that must be "
            "in memory as a whole. Write its rows as .jsonl, one row a line."
        )


@dataclass(frozen=True, slots=True)
class JsonLine:
    """A line's number, from 1, and its value; `problem` says why it has none."""

    number: int
    value: Any
    problem: str | None = None


def json_lines(path: Path, limits: JsonLimits = LIMITS) -> Iterator[JsonLine]:
    """Each line that is not blank, parsed, or what is wrong with it; one line is in memory at a time.

    Raises:
        OSError: Missing, or not a file.
    """
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(limits.max_line_bytes + 1), b""), 1):
            try:
                if len(line) > limits.max_line_bytes:
                    raise _too_long(f"{path}, line {number}", limits)
                if text := _as_text(line, path, start).strip():
                    yield JsonLine(number, decode(text, path, number))
            except DataError as error:
                yield JsonLine(number, None, str(error))
            start += len(line)
            while len(line) > limits.max_line_bytes and not line.endswith(b"\n"):  # skip its rest
                line = file.readline(limits.max_line_bytes + 1)
                start += len(line)


def decode(text: str, path: Path, first_line: int) -> Any:
    """Parse JSON; what parsers interpret differently is refused. NaN and infinity, which are not JSON, are null.

    Raises:
        DataError: Not JSON, a key twice in one object, a number of thousands of digits, or nested too deeply. Names
            file and line.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except _Refused as error:
        raise DataError(f"{_place(text, path, first_line, error.word)}: {error}") from None
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}, line {line}, column {error.colno}: {error.msg}. Correct the JSON there.") from None
    except RecursionError:
        raise DataError(f"{path}, line {first_line}: nested too deeply to be a dataset. Correct the file.") from None
    except ValueError as error:  # a number that is too long for int()
        raise DataError(f"{path}, line {first_line}: {str(error).split(';')[0]}. Shorten the number.") from None


def lone_surrogate(text: str) -> int | None:
    r"""Where a text has half of a surrogate pair, such as "\ud83d" alone, which cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _place(text: str, path: Path, first_line: int, word: str) -> str:
    """File and line; if several lines contain the word, the first is only a hint."""
    place = text.find(word)
    if text.count("\n") == 0 or place < 0 or text.count(word) > 2:
        return f"{path}, line {first_line}" if text.count("\n") == 0 else f"{path}"
    return f"{path}, line {first_line + text.count(chr(10), 0, place)}"


def _as_text(content: bytes, path: Path, start: int) -> str:
    try:
        return (content.removeprefix(BOM) if start == 0 else content).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {start + error.start}). Save it as UTF-8.") from None


def list_items(path: Path, limits: JsonLimits = LIMITS) -> Iterator[Any]:
    """The items of a file that is one JSON list, of any size; one item is in memory at a time.

    Raises:
        DataError: Not UTF-8, not a list, or as `decode`; raised after the items before the error.
        OSError: Missing, or not a file.
    """
    yield from _in_parts(path, limits, "list", lambda items: items.of_list())


def object_items(path: Path, limits: JsonLimits = LIMITS) -> Iterator[tuple[str, Any, bool]]:
    """The members of a file that is one JSON object: key, value, and whether it is one item of that key's list.

    Raises:
        DataError: Not UTF-8, not an object, or as `decode`; raised after the items before the error.
        OSError: Missing, or not a file.
    """
    yield from _in_parts(path, limits, "object", lambda items: items.of_object())


def _in_parts(path: Path, limits: JsonLimits, kind: str, read: Callable[["_Items"], Iterator[Any]]) -> Iterator[Any]:
    items = None
    expected = "a list of rows" if kind == "list" else "an object"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            items = _Items(file, limits.max_line_bytes)
            yield from read(items)
        return
    except _TooLong:
        assert items is not None
        raise _too_long(f"{path}, near line {items.line}", limits) from None
    except (ValueError, RecursionError) as error:  # or of another kind: parsing all of it finds the line
        if path.stat().st_size > limits.max_line_bytes:  # too large for that
            near = "" if items is None else f", near line {items.line}"
            why = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(":")[0]
            raise DataError(f"{path}{near}: expected {expected} ({why}). Correct the JSON there.") from None
    value = decode(read_text(path, limits), path, 1)
    raise DataError(f"{path}: expected {expected}, got {type(value).__name__}. Put the rows into one JSON list.")


def _too_long(place: str, limits: JsonLimits) -> DataError:
    return DataError(
        f"{place}: longer than {limits.max_line_bytes:,} bytes, which no row is. Write one row a line, and images as "
        "files of their own."
    )


class _TooLong(Exception):
    """An item is longer than a row may be."""


class _Items:
    """Parses item by item from a window of the text; raises `ValueError` where it is of another kind."""

    def __init__(self, file: TextIOBase, max_chars: int) -> None:
        self._file, self._max_chars = file, max_chars
        self._window, self._at = "", 0
        self._lines_before = 0
        self._decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)

    def of_list(self) -> Iterator[Any]:
        yield from self._list()
        self._end()

    def of_object(self) -> Iterator[tuple[str, Any, bool]]:
        self._take("{")
        keys: set[str] = set()
        while self._peek() != "}":
            if keys:
                self._take(",")
            key = self._item()
            if not isinstance(key, str):
                raise ValueError("a key that is not text")
            if key in keys:
                raise ValueError(f"the key {key!r} is there twice")
            keys.add(key)
            self._take(":")
            if self._peek() == "[":
                yield from ((key, item, True) for item in self._list())
            else:
                yield key, self._item(), False
        self._take("}")
        self._end()

    def _list(self) -> Iterator[Any]:
        self._take("[")
        if self._peek() != "]":
            yield self._item()
            while self._peek() != "]":
                self._take(",")
                yield self._item()
        self._take("]")

    def _end(self) -> None:
        if self._peek():
            raise ValueError("text after the end")

    def _peek(self) -> str:
        """The next character that is not a space, "" at the end."""
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
            if match and self._window[match.end() : match.end() + 1] in (*",]}:",):
                self._at = end
                return value
            if not self._more():  # a window may end after the "1." of 1.5
                raise ValueError("the list does not go on")

    def _more(self) -> bool:
        """Read on, as much again as is waiting, so that a long item is not parsed again for each chunk."""
        if len(self._window) - self._at > self._max_chars:
            raise _TooLong
        self._lines_before += self._window.count("\n", 0, self._at)
        part = self._file.read(max(CHUNK_CHARS, len(self._window) - self._at))
        self._window, self._at = self._window[self._at :] + part, 0
        return bool(part)

    @property
    def line(self) -> int:
        """Where it reads, from 1."""
        return self._lines_before + self._window.count("\n", 0, self._at) + 1


class _Refused(ValueError):
    """What parsers interpret differently; `word` helps to find it in the text."""

    def __init__(self, word: str, reason: str) -> None:
        super().__init__(reason)
        self.word = word


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise _Refused(twice, f"the key {twice!r} is there twice in one object, and readers disagree on which one "
                       "counts. Remove one.")  # fmt: skip
    return found


def _no_number(name: str) -> None:
    """NaN and infinity: Python's writers leave them in fields that nobody measured."""
