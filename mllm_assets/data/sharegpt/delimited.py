"""Read CSV, TSV and the like record by record, within bounds; a record that cannot be read costs itself alone."""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from mllm_assets.data.sharegpt.formats import Format
from mllm_assets.data.sharegpt.json_text import LIMITS
from mllm_assets.data.sharegpt.pictures import IMAGE_SUFFIXES
from mllm_assets.errors import DataError

# of a record, which is in memory as a whole: it may hold a picture as base64
_PICTURE_NAME = re.compile(rf"({'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))})(#\d+)?$", re.IGNORECASE)
_PICTURE_NUMBER = re.compile(r"0\d+|\d{3,}")  # a column may be called 0 or 1
MAX_RECORD_CHARS, MAX_COLUMNS = LIMITS.max_line_bytes, 10_000


def records(path: Path, format: Format) -> Iterator[tuple[int, dict[str, str | None] | None, str | None]]:
    """The line, from 1, the values and what is wrong with each record; an empty cell has the value None.

    Raises:
        DataError: A record is too long, or there are too many columns.
        OSError: The file is missing.
    """
    csv.field_size_limit(MAX_RECORD_CHARS)
    # `conversation.text_defect` reports what is not UTF-8
    with path.open(encoding=format.encoding, errors="replace", newline="") as file:
        lines = _RecordLines(file, path)
        reader = csv.DictReader(lines, delimiter=format.delimiter, skipinitialspace=format.is_spaced)
        if (names := headless_names(reader.fieldnames or ())) is not None:
            first = {name: text or None for name, text in zip(names, reader.fieldnames or (), strict=True)}
            reader.fieldnames = names
            yield 1, first, None
        if len(reader.fieldnames or ()) > MAX_COLUMNS:
            raise DataError(
                f"{path} has more than {MAX_COLUMNS:,} columns. Write one row a line, with its few columns."
            )
        while True:
            lines.start_record()
            try:
                values = next(reader, None)
            except csv.Error as error:  # a quote without an end
                line = reader.reader.line_num
                yield line, None, f"{path}, line {line}: {error}. Correct it."
                continue
            if values is None:
                return
            # the line that it begins on: a quoted text may span several
            line = reader.line_num - sum(str(value).count(chr(10)) for value in values.values())
            if None in values:
                yield line, None, f"{path}, line {line}: more values than columns. Quote what has a comma in it."
            else:
                yield line, {name: text or None for name, text in values.items()}, None


def headless_names(cells: Sequence[str]) -> list[str] | None:
    """The columns of a table whose first line is a row already: it has a picture's name, or number and text."""
    is_picture = [_PICTURE_NAME.search(cell.strip()) is not None for cell in cells]
    if len(cells) == 2 and not any(is_picture) and any(" " in cell.strip() for cell in cells):
        is_picture = [_PICTURE_NUMBER.fullmatch(cell.strip()) is not None for cell in cells]
    if not any(is_picture) or len(cells) < 2:
        return None
    first = is_picture.index(True)
    others = iter(["text"] if len(cells) == 2 else [f"column_{number}" for number in range(2, len(cells) + 1)])
    return ["image" if number == first else next(others) for number in range(len(cells))]


class _RecordLines:
    """The lines of a CSV, as long as a record of them does not take more memory than a row may."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._left = MAX_RECORD_CHARS

    def start_record(self) -> None:
        self._left = MAX_RECORD_CHARS

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(self._left + 1):
            self._left -= len(line)
            if self._left < 0:
                text = f"{self._path}: a row of more than {MAX_RECORD_CHARS:,} characters."
                raise DataError(f"{text} Close its quotes, or shorten it.")
            yield line
