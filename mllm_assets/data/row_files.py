"""Files of ShareGPT rows: JSON (one list), JSON lines and Parquet, as LLaMA-Factory reads them."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.data.arrow_values import rows_of
from mllm_assets.data.dataset_info import DATASET_INFO
from mllm_assets.data.json_stream import list_items
from mllm_assets.data.json_text import json_lines
from mllm_assets.data.paths import location_of
from mllm_assets.errors import DataError

SUFFIXES = (".json", ".jsonl", ".parquet")
PARQUET_GROUP_ROWS = 8192  # so many rows are in memory at once


@dataclass(frozen=True, slots=True)
class FileRow:
    """A row of a file: `part` is "line 17" or, from 0, "row 12"; `problem` says why it has no value."""

    file: Path
    part: str
    value: Any
    problem: str | None = None

    @property
    def place(self) -> str:
        """Where it is, as errors say it."""
        return f"{self.file}, {self.part}"

    def location(self, folder: Path) -> str:
        """Where it is below a folder; see `paths.location_of`."""
        return location_of(self.file, folder, self.part.removeprefix("line "))


def file_rows(path: Path) -> Iterator[FileRow]:
    """The rows of a file, or of all files in a folder by name; a line that is not JSON is a row with a problem.

    Raises:
        DataError: Missing, of another kind, or a .json file that is no list in UTF-8 (names the line).
    """
    files = sorted(p for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else [path]
    for file in files:
        if file.suffix not in SUFFIXES:
            raise DataError(f"{file} is neither {' nor '.join(SUFFIXES)}. Convert the file to JSON.")
        if file.suffix == ".parquet":
            yield from _parquet_rows(file)
        elif file.suffix == ".jsonl":
            yield from _json_lines(file)
        else:
            for index, value in enumerate(_json_list(file)):
                yield FileRow(file, f"row {index}", value)


def read_rows(path: Path) -> Iterator[Any]:
    """The values of `file_rows`.

    Raises:
        DataError: As `file_rows`, or a line is not JSON.
    """
    for row in file_rows(path):
        if row.problem is not None:
            raise DataError(row.problem)
        yield row.value


def write_rows(path: Path, rows: Iterable[dict[str, Any]], format: str) -> None:
    """Write rows one by one: the same rows give the same bytes.

    Args:
        path: The new file.
        rows: Texts, and lists and objects of them. Can be iterated over more than once.
        format: "json" (one list), "jsonl" or "parquet".
    """
    if format == "parquet":
        _write_parquet(path, rows)
        return
    with path.open("wb") as file:
        if format == "jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
            return
        # what json.dumps makes of the whole list, without the list
        between = b"[\n  "
        for row in rows:
            file.write(between + orjson.dumps(row, option=orjson.OPT_INDENT_2).replace(b"\n", b"\n  "))
            between = b",\n  "
        file.write(b"[]\n" if between.startswith(b"[") else b"\n]\n")


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    # a column is there if any row has it, and its type may show late
    schemas: dict[pa.Schema, None] = {}
    for batch in _batches(rows):
        keys = dict.fromkeys(key for row in batch for key in row)  # `from_pylist` looks at the first row's only
        schemas[pa.Table.from_pylist([{key: row.get(key) for key in keys} for row in batch]).schema] = None
    schema = pa.unify_schemas(list(schemas), promote_options="permissive")
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for batch in _batches(rows):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    left = iter(rows)
    while batch := list(islice(left, PARQUET_GROUP_ROWS)):
        yield batch


def _parquet_rows(path: Path) -> Iterator[FileRow]:
    index = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in rows_of(batch):
                    yield FileRow(path, f"row {index}", {key: v for key, v in value.items() if v is not None})
                    index += 1
    except FileNotFoundError:
        raise _missing(path) from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}). Write it again.") from error


def _json_lines(path: Path) -> Iterator[FileRow]:
    try:
        for line in json_lines(path):
            yield FileRow(path, f"line {line.number}", line.value, line.problem)
    except (FileNotFoundError, IsADirectoryError):
        raise _missing(path) from None


def _json_list(path: Path) -> Iterator[Any]:
    try:
        yield from list_items(path)
    except (FileNotFoundError, IsADirectoryError):
        raise _missing(path) from None


def _missing(path: Path) -> DataError:
    return DataError(f"There is no file {path}. Materialise its dataset, or correct `file_name` in {DATASET_INFO}.")
