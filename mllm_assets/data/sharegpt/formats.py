"""What a file of rows is, told by its content and not by its suffix."""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from mllm_assets.data.sharegpt.json_text import BOM, LIMITS
from mllm_assets.data.sharegpt.pictures import IMAGE_SUFFIXES
from mllm_assets.errors import DataError
from mllm_assets.file_digests import state_of

Kind = Literal["parquet", "arrow_file", "arrow_stream", "json_list", "json_object", "json_lines", "delimited"]
ROW_FORMATS = "JSON, JSON lines, CSV, TSV, Parquet and Arrow"
HEAD_BYTES = 2**16
DELIMITERS = ",\t;|"
MAX_SNIFFED_RECORDS = 20
# the lists of an object that is a file of rows; COCO's and VQA's annotations are joined by `ingest.coco`
TALKS = {"messages", "conversations"}  # an object with one of these is a row
ROW_LISTS = ("data", "rows", "annotations", "questions", "images", "samples", "items", "train", "examples")


@dataclass(frozen=True, slots=True)
class Format:
    """A file's format; a delimited file has a delimiter and an encoding too, and may have a space before quotes."""

    kind: Kind
    delimiter: str = ""
    encoding: str = "utf-8-sig"
    is_spaced: bool = False


def format_of(path: Path) -> Format | None:
    """The format of a file of rows by its first bytes, or None; a file that nobody wrote to is looked at once.

    Raises:
        OSError: Missing, or not a file.
    """
    found = path.stat()
    return _format_by_content(str(path), *state_of(found), found.st_size)


@lru_cache(maxsize=4096)
def _format_by_content(name: str, *_: int) -> Format | None:
    path = Path(name)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head[:4] == b"PAR1":
        return Format("parquet")
    if head[:6] == b"ARROW1":
        return Format("arrow_file")
    if head[:4] == b"\xff\xff\xff\xff":
        return Format("arrow_stream")
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    if encoding == "utf-8-sig" and b"\0" in head:
        return None
    text = head.removeprefix(BOM).decode(encoding if encoding == "utf-16" else "utf-8", "replace")
    start = text.lstrip()[:1]
    if start == "[":
        return Format(_kind_of_list(text))
    if start == "{":
        return Format(_kind_of_objects(path))
    delimiter = _delimiter(text, whole=len(head) < HEAD_BYTES)
    if delimiter is None:
        return None
    return Format("delimited", delimiter, encoding, _is_spaced(_records(text, delimiter, whole=len(head) < HEAD_BYTES)))


def require_format(path: Path) -> Format:
    """The format of a file of rows.

    Raises:
        DataError: It is none of them, or empty.
        OSError: Missing, or not a file.
    """
    found = format_of(path)
    if found is None and path.suffix.lower() in (".csv", ".tsv"):  # of one column, so that no delimiter shows
        return Format("delimited", "\t" if path.suffix.lower() == ".tsv" else ",")
    if found is None and path.suffix == ".parquet":
        return Format("parquet")  # whose reader says what is wrong
    if found is None and path.suffix == ".arrow":
        return Format("arrow_file")
    if found is None and path.suffix in (".json", ".jsonl"):
        return Format("json_list" if path.suffix == ".json" else "json_lines")
    if found is None:
        raise DataError(f"{path} is none of {ROW_FORMATS}. Convert the file to JSON lines, one row a line.")
    return found


def _kind_of_list(text: str) -> Kind:
    """One list, or JSON lines of which the first is a list: then it ends with its line, and others follow."""
    first, _, rest = text.lstrip().partition("\n")
    with suppress(ValueError, RecursionError):
        if json.loads(first) is not None and rest.strip():
            return "json_lines"
    return "json_list"


def _kind_of_objects(path: Path) -> Kind:
    """JSON lines, or one object: a first line that is an object of its own is a row, unless it holds all the rows."""
    with path.open("rb") as file:
        lines = (line for line in iter(lambda: file.readline(LIMITS.max_line_bytes + 1), b"") if line.strip())
        first, second = next(lines, b""), next(lines, b"")
    if second.lstrip()[:1] == b"{":
        return "json_lines"
    if len(first) > LIMITS.max_line_bytes:
        return "json_object"
    try:
        value = json.loads(first.removeprefix(BOM))
    except (ValueError, RecursionError):
        # a damaged line among others is still a line
        return "json_lines" if second and first.rstrip().endswith(b"}") else "json_object"
    if second or not isinstance(value, dict):
        return "json_lines"
    lists = [item for name in ROW_LISTS if isinstance(item := value.get(name), list)]
    holds_rows = any(item and all(isinstance(row, dict) for row in item) for item in lists) and not value.keys() & TALKS
    by_key = len(value) > 1 and all(isinstance(item, dict) for item in value.values())
    by_key = by_key or (len(value) > 0 and all(name.lower().endswith(tuple(IMAGE_SUFFIXES)) for name in value))
    lengths = {len(item) if isinstance(item, list) else -1 for item in value.values()}
    by_key = by_key or (len(value) > 1 and len(lengths) == 1 and min(lengths) > 1 and not value.keys() & TALKS)
    return "json_object" if holds_rows or by_key or holds_pictures_by_class(value) else "json_lines"


def holds_pictures_by_class(value: Mapping[str, Any]) -> bool:
    """Whether an object has a list of pictures for each of its keys, which are the folders that they are in."""
    return len(value) > 1 and all(
        isinstance(names, list)
        and names
        and all(isinstance(name, str) and name.startswith(f"{key}/") for name in names)
        for key, names in value.items()
    )


def _delimiter(text: str, *, whole: bool) -> str | None:
    """The delimiter whose first records have the same number of columns, at least two, most columns first."""
    best: tuple[float, int, str] | None = None
    for delimiter in DELIMITERS:
        try:
            widths = [len(record) for record in _records(text, delimiter, whole=whole)]
        except csv.Error:
            continue
        if len(widths) < 2 or widths[0] < 2:
            continue
        agree = Counter(widths)[widths[0]] / len(widths)
        if agree >= 0.8 and (best is None or (agree, widths[0]) > best[:2]):
            best = (agree, widths[0], delimiter)
    return best[2] if best else None


def _records(text: str, delimiter: str, *, whole: bool) -> list[list[str]]:
    """The first records; the last line of a text that is not whole may be cut off."""
    lines = text.splitlines(keepends=True)
    reader = csv.reader(io.StringIO("".join(lines if whole else lines[:-1]), newline=""), delimiter=delimiter)
    return [record for record, _ in zip(reader, range(MAX_SNIFFED_RECORDS), strict=False) if record]


def _is_spaced(records: list[list[str]]) -> bool:
    """Whether each row quotes its text after a space, as ICDAR's do, so that the quotes would be of the text."""
    rows = records[1:] or records
    return all(any(cell.startswith(' "') for cell in record[1:]) for record in rows)
