"""Files of rows: JSON, JSON lines, CSV, TSV, Parquet and Arrow, told by content; one reader for all that has rows."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.data.sharegpt.delimited import records
from mllm_assets.data.sharegpt.entries import DATASET_INFO
from mllm_assets.data.sharegpt.formats import Format, holds_pictures_by_class, require_format
from mllm_assets.data.sharegpt.json_text import json_lines, list_items, object_items
from mllm_assets.data.sharegpt.pictures import IMAGE_SUFFIXES
from mllm_assets.errors import DataError

PARQUET_GROUP_ROWS = 8192  # rows in memory at once
MAX_PACKED, MAX_BATCH_BYTES = 20, 2**24  # pictures and texts do not compress by more
BATCH_ROWS = 64  # the same on reading: rows may embed images
BUFFER_BYTES = 2**23  # a column of a row group is read in parts of this size
MAX_EXPANSION, FREE_BYTES = 200, 2**32  # what a compressed file may expand to for each byte, beyond some GiB


@dataclass(frozen=True, slots=True)
class FileRow:
    """A row of a file: `part` is "line 17" or, from 0, "row 12"; `problem` says why it has no value."""

    file: Path
    part: str
    value: Any
    problem: str | None = None

    @property
    def place(self) -> str:
        """Where it is, for errors."""
        return f"{self.file}, {self.part}"

    def location(self, folder: Path) -> str:
        """Where it is below a folder; see `location_of`."""
        return location_of(self.file, folder, self.part.removeprefix("line "))


def file_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[FileRow]:
    """The rows of a file, or of all files in a folder by name; a row that cannot be read is one with a problem.

    A value that is missing has no key. Of Parquet and Arrow only `columns` are read where they are given.

    Raises:
        DataError: Missing, of no format of rows, or damaged (names the line, where there are lines).
    """
    files = sorted(p for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else [path]
    for file in files:
        if file.exists() and not file.is_file():
            raise DataError(f"{file} is neither a file nor a link to one. Take it out of {path.parent}.")
        with _missing_named(file):
            yield from _rows_of_file(file, require_format(file), columns)


def _rows_of_file(path: Path, format: Format, columns: Sequence[str] | None) -> Iterator[FileRow]:
    if format.kind in ("parquet", "arrow_file", "arrow_stream"):
        yield from arrow_rows(path, format, columns)
    elif format.kind == "json_lines":
        for line in json_lines(path):
            yield FileRow(path, f"line {line.number}", line.value, line.problem)
    elif format.kind == "json_list":
        for index, value in enumerate(list_items(path)):
            yield FileRow(path, f"row {index}", value)
    elif format.kind == "json_object":
        yield from _rows_of_object(path)
    else:
        for line, values, problem in records(path, format):
            named = None if values is None else {name: text for name, text in values.items() if text is not None}
            yield FileRow(path, f"line {line}", named, problem)


def _rows_of_object(path: Path) -> Iterator[FileRow]:
    """The rows of a file that is one object: of its one list of objects, or one row for each key, which is its id.

    Raises:
        DataError: It has several lists of objects, or no rows.
    """
    index, rows_of = 0, None
    by_key: list[dict[str, Any]] = []  # a few objects beside a list say something about all rows
    texts: dict[str, list[Any]] = {}  # of pictures by name, or the values of columns
    for key, value, is_item in object_items(path):
        if not isinstance(value, dict):
            if rows_of is None and (is_item or isinstance(value, str)):
                texts.setdefault(key, []).append(value)
            continue
        if not is_item:
            if rows_of is None:
                by_key.append({"id": key, **value})
            continue
        if rows_of not in (None, key):
            raise DataError(
                f"{path} is a JSON object with several lists of rows ({rows_of}, {key}). Write the rows as one list; "
                "COCO's and VQA's annotations are read by a source of kind 'coco'."
            )
        rows_of = key
        yield FileRow(path, f"row {index}", value)
        index += 1
    if rows_of is None and not by_key:
        by_key = _rows_of_texts(texts)
    if rows_of is None:
        yield from (FileRow(path, f"row {number}", value) for number, value in enumerate(by_key))
        index = len(by_key)
    if not index:
        raise DataError(f"{path} is one JSON object without rows. Put the rows into one JSON list.")


def _rows_of_texts(texts: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """The rows of an object: pictures' names to their texts, classes to their pictures, or columns to their values."""
    if all(name.lower().endswith(tuple(IMAGE_SUFFIXES)) for name in texts):
        return [{"file_name": name, "text": found if len(found) > 1 else found[0]} for name, found in texts.items()]
    if holds_pictures_by_class(texts):
        return [{"file_name": name, "label": label} for label, names in texts.items() for name in names]
    lengths = {len(values) for values in texts.values()}
    if len(texts) > 1 and len(lengths) == 1 and lengths != {1}:
        return [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
    return []


def read_rows(path: Path) -> Iterator[Any]:
    """The values of `file_rows`; raises as it does, and DataError for a line that is not JSON."""
    for row in file_rows(path):
        if row.problem is not None:
            raise DataError(row.problem)
        yield row.value


def write_rows(path: Path, rows: Iterable[dict[str, Any]], format: str) -> None:
    """Write rows one by one as "json" (one list), "jsonl" or "parquet": the same rows give the same bytes.

    They hold texts, and lists and objects of them, and can be iterated over more than once.
    """
    if format == "parquet":
        _write_parquet(path, rows)
        return
    with path.open("wb") as file:
        if format == "jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
            return
        # the output of json.dumps for the list, without the list in memory
        between = b"[\n  "
        for row in rows:
            file.write(between + orjson.dumps(row, option=orjson.OPT_INDENT_2).replace(b"\n", b"\n  "))
            between = b",\n  "
        file.write(b"[]\n" if between.startswith(b"[") else b"\n]\n")


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    # a column exists if any row has it, and its type may be known late
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


def rows_at_once(file: pq.ParquetFile, most: int, row_group: int | None = None) -> int:
    """How many rows to read together: fewer where a large value is there once and is in many rows.

    A dictionary of one picture of 128 MiB, all zero, takes 4 KiB of a file, and its thousand rows 128 GiB of memory.
    """
    metadata = file.metadata
    numbers = range(metadata.num_row_groups) if row_group is None else [row_group]
    groups = (metadata.row_group(number) for number in numbers)
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    sizes = [
        c.total_uncompressed_size
        if c.total_uncompressed_size > MAX_PACKED * c.total_compressed_size
        else 2 * c.total_uncompressed_size // max(1, c.num_values)  # a row is often larger than the mean
        for c in chunks
    ]
    return max(1, min(most, MAX_BATCH_BYTES // max(1, *sizes, 0)))


def schema_of(path: Path, format: Format) -> pa.Schema | None:
    """The schema of a file that has one; raises DataError where it is damaged."""
    if format.kind not in ("parquet", "arrow_file", "arrow_stream"):
        return None
    with _opened(path, format) as (schema, _):
        return schema


def arrow_rows(path: Path, format: Format, columns: Sequence[str] | None = None) -> Iterator[FileRow]:
    """The rows of a Parquet or Arrow file; raises DataError as `file_rows`."""
    index, left = 0, FREE_BYTES + MAX_EXPANSION * path.stat().st_size
    with _opened(path, format) as (schema, batches_of):
        for batch in batches_of(list(columns) if columns is not None else schema.names):
            for part in (batch.slice(at, BATCH_ROWS) for at in range(0, batch.num_rows, BATCH_ROWS)):
                left -= part.nbytes
                if left < 0:
                    raise pa.ArrowInvalid(f"it expands to more than {MAX_EXPANSION} bytes for each of its own")
                for value in rows_of(part):
                    yield FileRow(path, f"row {index}", {k: v for k, v in value.items() if v is not None})
                    index += 1


@contextmanager
def _opened(path: Path, format: Format) -> Iterator[tuple[pa.Schema, Callable[[list[str]], Iterable[pa.RecordBatch]]]]:
    """The schema, and a function that returns batches of chosen columns."""
    try:
        with ExitStack() as stack:
            if format.kind == "parquet":
                # pre-buffering would keep all until the end, and without a buffer a column is read as a whole
                file = stack.enter_context(
                    pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False, buffer_size=BUFFER_BYTES)
                )
                num_rows = rows_at_once(file, BATCH_ROWS)
                yield file.schema_arrow, lambda columns: file.iter_batches(num_rows, columns=columns, use_threads=False)
                return
            data = stack.enter_context(pa.memory_map(str(path)))
            if format.kind == "arrow_file":
                reader = stack.enter_context(pa.ipc.open_file(data))
                numbers = range(reader.num_record_batches)
                yield reader.schema, lambda columns: (reader.get_batch(number).select(columns) for number in numbers)
            else:  # `datasets` writes its .arrow files as streams
                stream = stack.enter_context(pa.ipc.open_stream(data))
                yield stream.schema, lambda columns: (batch.select(columns) for batch in stream)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError):
            raise
        shown = "Parquet" if format.kind == "parquet" else "Arrow"
        raise DataError(
            f"{path} cannot be read as {shown} ({str(error).splitlines()[0]}). Write the file again, or copy it again "
            "from its origin."
        ) from error


@contextmanager
def _missing_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(
            f"There is no file {path}. Materialise its dataset, or correct `file_name` in {DATASET_INFO}."
        ) from None


def location_of(file: Path, folder: Path, part: str = "") -> str:
    """A readable location below a source's folder: `a.png`, `metadata.jsonl:17` (line), `a.parquet:row 12` (from 0)."""
    name = _name_below(str(file), str(folder))
    return f"{name}:{part}" if part else name


@lru_cache
def _name_below(file: str, folder: str) -> str:
    return Path(file).relative_to(folder).as_posix()  # 30 us, of each row of a file; a path takes longer to find again


def values_of(column: pa.Array) -> list[Any]:
    """`to_pylist`, with U+FFFD for what cannot be decoded: `conversation.text_defect` then rejects that row alone."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def rows_of(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch as dictionaries."""
    columns = [values_of(column) for column in batch.columns]
    names = batch.schema.names
    if not columns:
        return [{} for _ in range(batch.num_rows)]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _value(scalar: Any) -> Any:
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StringScalar):
        return scalar.as_buffer().to_pybytes().decode("utf-8", "replace")
    if isinstance(scalar, pa.DictionaryScalar):
        return _value(scalar.value)
    if isinstance(scalar, pa.StructScalar):
        return {name: _value(scalar[name]) for name in scalar}
    if isinstance(scalar, pa.ListScalar):
        return values_of(scalar.values)
    return scalar.as_py()
