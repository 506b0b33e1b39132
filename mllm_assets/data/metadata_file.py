"""The file beside a folder's images that has a row for each: `metadata.jsonl`, `.csv` or `.parquet`."""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.data.arrow_values import rows_of
from mllm_assets.data.json_text import LIMITS, check_size, json_lines
from mllm_assets.errors import DataError

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# the columns that name a row's image or images, as `datasets` knows them
FILE_COLUMNS = ("file_name", "file_names", "images_file_names", "image_file_name")
MAX_NAMED = 10


@dataclass(frozen=True, slots=True)
class MetadataRow:
    """A row and its line, of a Parquet file "row 12" from 0; `problem` says why it has no values."""

    part: int | str
    values: dict[str, Any]
    problem: str | None = None

    @property
    def place(self) -> str:
        return f"line {self.part}" if isinstance(self.part, int) else self.part


@dataclass(slots=True)
class Problems:
    """What is wrong with many rows: all are counted, the first are named."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        self.count += 1
        if len(self.first) < MAX_NAMED:
            self.first.append(problem)

    def text(self) -> str:
        more = self.count - len(self.first)
        return "\n".join([*self.first, *([f"and {more} more rows."] if more else [])])


def read_metadata(path: Path) -> Iterator[MetadataRow]:
    """The rows of a metadata file; a line that is no JSON object is a row with a problem.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    if path.suffix == ".parquet":
        try:
            rows = (row for batch in pq.read_table(path).to_batches() for row in rows_of(batch))
            yield from (MetadataRow(f"row {number}", row) for number, row in enumerate(rows))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}). Write it again.") from error
    elif path.suffix == ".csv":
        yield from _csv_rows(path)
    else:
        for line in json_lines(path):
            if line.problem is None and not isinstance(line.value, dict):
                got = type(line.value).__name__
                problem = f"{path}, line {line.number}: expected an object, got {got}. Correct it."
                yield MetadataRow(line.number, {}, problem)
            else:
                yield MetadataRow(line.number, line.value or {}, line.problem)


def _csv_rows(path: Path) -> Iterator[MetadataRow]:
    check_size(path, LIMITS)
    # what is not UTF-8 is left for `tokens.text_defect` to find
    reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig", "replace"), newline=""))
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:  # a quote without an end
            number = reader.reader.line_num
            yield MetadataRow(number, {}, f"{path}, line {number}: {error}. Correct it.")
            continue
        if values is None:
            return
        # the line that it begins on: a quoted text may go over several
        yield MetadataRow(reader.line_num - sum(str(value).count("\n") for value in values.values()), values)


def file_names(values: Mapping[str, Any]) -> list[str] | None:
    """The images that a row names, None where it names none."""
    for column in FILE_COLUMNS:
        found = values.get(column)
        if isinstance(found, str) and found:
            return [found]
        if isinstance(found, list) and all(isinstance(name, str) for name in found):
            return found
    return None


def unnamed_images(values: Mapping[str, Any]) -> str:
    """What to say of a row that names none."""
    return (
        "expected `file_name` with the image's path, or `file_names` with a list of them, got the columns "
        f"{', '.join(map(str, values)) or 'none'}. Add it."
    )
