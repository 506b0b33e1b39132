"""Read JSON that strangers wrote: strictly, within a size, and with the file and line of what is wrong."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mllm_assets.errors import DataError

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonLimits:
    """Sizes above which a file is refused before it is in memory; parsed, JSON takes about eight times its size."""

    max_file_bytes: int = 512 * 2**20  # of a .json, which others read whole
    max_line_bytes: int = 64 * 2**20  # of a .jsonl, which is read line by line


LIMITS = JsonLimits()


def read_text(path: Path, limits: JsonLimits = LIMITS) -> str:
    """A whole UTF-8 file; a byte order mark is skipped.

    Raises:
        DataError: Too large, or not UTF-8.
        OSError: Missing, or not a file.
    """
    check_size(path, limits)
    return _as_text(path.read_bytes(), path, 0)


def check_size(path: Path, limits: JsonLimits) -> None:
    """Refuse a .json file that is too large to be in memory; what a person wrote as one list is read so somewhere.

    Raises:
        DataError: Too large.
        OSError: Missing.
    """
    num_bytes = path.stat().st_size
    if num_bytes > limits.max_file_bytes:
        raise DataError(
            f"{path} has {num_bytes:,} bytes, expected at most {limits.max_file_bytes:,} of a .json file, which must "
            "be in memory as a whole. Write its rows as .jsonl, one row a line."
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
                _check_length(line, path, number, limits)
                if text := _as_text(line, path, start).strip():
                    yield JsonLine(number, decode(text, path, number))
            except DataError as error:
                yield JsonLine(number, None, str(error))
            start += len(line)
            while len(line) > limits.max_line_bytes and not line.endswith(b"\n"):  # what is left of it
                line = file.readline(limits.max_line_bytes + 1)
                start += len(line)


def _check_length(line: bytes, path: Path, number: int, limits: JsonLimits) -> None:
    if len(line) > limits.max_line_bytes:
        raise DataError(
            f"{path}, line {number}: longer than {limits.max_line_bytes:,} bytes, which no row is. Write one row a "
            "line, and images as files of their own."
        )


def decode(text: str, path: Path, first_line: int) -> Any:
    """Parse JSON; what a lenient parser would guess at is refused.

    Raises:
        DataError: Not JSON, a key twice in one object, NaN or infinity, a number of thousands of digits, or nested
            too deeply. Names file and line.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{_place(text, path, first_line, twice)}: the key {twice!r} is there twice in one object, "
                            "and readers disagree on which one counts. Remove one.")  # fmt: skip
        return found

    def constant(name: str) -> NoReturn:
        raise DataError(f"{_place(text, path, first_line, name)}: {name} is not JSON. Remove the value, or write null.")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}, line {line}, column {error.colno}: {error.msg}. Correct the JSON there.") from None
    except RecursionError:
        raise DataError(f"{path}, line {first_line}: nested too deeply to be a dataset. Correct the file.") from None
    except ValueError as error:  # a number that is too long for int()
        raise DataError(f"{path}, line {first_line}: {str(error).split(';')[0]}. Shorten the number.") from None


def lone_surrogate(text: str) -> int | None:
    r"""Where a text holds half of a pair, such as "\ud83d" alone, which is no character and cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _place(text: str, path: Path, first_line: int, word: str) -> str:
    """File and line; of several lines with the word the first is meant to help, not to be exact."""
    place = text.find(word)
    if text.count("\n") == 0 or place < 0 or text.count(word) > 2:
        return f"{path}, line {first_line}" if text.count("\n") == 0 else f"{path}"
    return f"{path}, line {first_line + text.count(chr(10), 0, place)}"


def _as_text(content: bytes, path: Path, start: int) -> str:
    try:
        return (content.removeprefix(BOM) if start == 0 else content).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {start + error.start}). Save it as UTF-8.") from None
