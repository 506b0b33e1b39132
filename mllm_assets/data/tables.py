"""Read Parquet and Arrow files of images and texts, below the project's root or embedded in the package."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.data.paths import common_folder, find_files, location_of
from mllm_assets.data.rows import SourceRow, class_names, needed_columns, rows_of_batch
from mllm_assets.data.spec import SourceSpec
from mllm_assets.errors import DataError

BATCH_ROWS = 16
_ARROW_FILE_MAGIC = b"ARROW1"


def read_tables(source: SourceSpec, root: Path) -> Iterator[SourceRow]:
    """Rows of all files in the order of `path`, those of a pattern by name.

    Raises:
        DataError: A file is missing, damaged or of another format, or lacks a column.
    """
    start = 0
    files = find_files(source, root)
    folder = common_folder(files)
    for path in files:
        first, name = start, location_of(path, folder)
        try:
            with _open(path, source.kind) as (schema, batches_of):
                names = class_names(schema, source.label_column)
                for batch in batches_of(needed_columns(source, schema, path.name)):
                    for part in (batch.slice(at, BATCH_ROWS) for at in range(0, batch.num_rows, BATCH_ROWS)):
                        indices = range(start, start + part.num_rows)
                        locations = [f"{name}:row {index - first}" for index in indices]
                        yield from rows_of_batch(part, source, names, indices, locations)
                        start += part.num_rows
        except (pa.ArrowException, OSError) as error:
            shown = "Parquet" if source.kind == "parquet" else "Arrow"
            raise DataError(
                f"source.path: {path} cannot be read as {shown} ({str(error).splitlines()[0]}). "
                "Write the file again, or copy it anew from where it came."
            ) from error


@contextmanager
def _open(path: Path, kind: str) -> Iterator[tuple[pa.Schema, Callable[[list[str]], Iterable[pa.RecordBatch]]]]:
    """The schema, and what gives the batches of chosen columns."""
    with ExitStack() as stack:
        if kind == "parquet":
            file = stack.enter_context(pq.ParquetFile(path, pre_buffer=False))  # buffers would be kept to the end
            yield file.schema_arrow, lambda columns: file.iter_batches(batch_size=BATCH_ROWS, columns=columns)
            return
        data = stack.enter_context(pa.memory_map(str(path)))
        if data.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC:
            reader = stack.enter_context(pa.ipc.open_file(data))
            numbers = range(reader.num_record_batches)
            yield reader.schema, lambda columns: (reader.get_batch(number).select(columns) for number in numbers)
        else:  # `datasets` writes its .arrow files as streams
            data.seek(0)
            stream = stack.enter_context(pa.ipc.open_stream(data))
            yield stream.schema, lambda columns: (batch.select(columns) for batch in stream)
