"""Read a local or embedded Parquet file of images and texts."""

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.artifacts import path_inside
from mllm_assets.data.rows import SourceRow, class_names, needed_columns, rows_of_batch
from mllm_assets.data.spec import SourceSpec
from mllm_assets.errors import DataError

PACKAGE_PREFIX = "package:"


def locate(source: SourceSpec, root: Path) -> Path:
    """The file a spec's `path` names: below the project root, or embedded in the package."""
    if source.path.startswith(PACKAGE_PREFIX):
        folder = Path(str(resources.files("mllm_assets") / "sample_data"))
        return path_inside(folder, source.path.removeprefix(PACKAGE_PREFIX), what="source.path")
    return path_inside(root, source.path, what="source.path")


def read_parquet(source: SourceSpec, root: Path) -> Iterator[SourceRow]:
    """Rows of a Parquet file in their order.

    Raises:
        DataError: The file is missing, is not Parquet or is damaged, or lacks a column.
    """
    path = locate(source, root)
    if not path.is_file():
        raise DataError(
            f"source.path {source.path!r}: there is no file {path}. Correct the path in the dataset's YAML."
        )
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:  # buffers would be kept to the end
            schema = file.schema_arrow
            columns = needed_columns(source, schema, source.path)
            names = class_names(schema, source.label_column)
            start = 0
            for batch in file.iter_batches(batch_size=16, columns=columns):
                indices = range(start, start + batch.num_rows)
                yield from rows_of_batch(batch, source, names, indices, source.path)
                start += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"source.path {source.path!r} cannot be read as Parquet ({str(error).splitlines()[0]}). "
            "Write the file again, or copy it anew from where it came."
        ) from error
