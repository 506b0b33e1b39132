"""A dataset's rows of DuckDB as Parquet, so that another machine judges and splits on from them.

The sides that samples were on before, and the measurements of their images, are in the database alone.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.artifacts import digest_json, read_manifest, sha256_file, staging_directory, write_manifest
from mllm_assets.artifacts import publish as publish_directory
from mllm_assets.quality.schema import SCHEMA_VERSION, TABLES
from mllm_assets.quality.store import QualityStore, arrow_schema

# rows that are keyed by content belong to whoever has that content
_CONTENT = {
    "image_quality": "image_sha256 IN (SELECT image_sha256 FROM images WHERE dataset = ?)",
    "caption_quality": "caption_sha256 IN (SELECT caption_sha256 FROM samples WHERE dataset = ?)",
}


def write_history(store: QualityStore, dataset: str, parent: Path) -> Path:
    """Write a dataset's rows to `parent/<digest>/<table>.parquet`, complete with a manifest; equal rows, equal name."""
    with staging_directory(parent) as staging:
        for name, table in TABLES.items():
            condition = "dataset = ?" if "dataset" in table.columns else _CONTENT.get(name)
            if condition is not None:
                order = ", ".join(f'"{column}"' for column in table.key)
                rows = store.query_arrow(f'SELECT * FROM "{name}" WHERE {condition} ORDER BY {order}', [dataset])
                pq.write_table(rows, staging / f"{name}.parquet")
        digest = digest_json([sha256_file(path) for path in sorted(staging.iterdir())])[:16]
        write_manifest(staging, {"kind": "quality_history", "dataset": dataset, "schema_version": SCHEMA_VERSION})
        publish_directory(staging, parent / digest)
    return parent / digest


def read_history(store: QualityStore, directory: Path) -> None:
    """Add the rows of `write_history` to the database; those that are there already change nothing.

    Tables and columns that this version does not know are left out, and those that the writer's did not know are null.
    """
    names = [name.removesuffix(".parquet") for name in read_manifest(directory)["files"]]
    tables: dict[str, pa.Table | pa.RecordBatchReader] = {
        name: pa.RecordBatchReader.from_batches(arrow_schema(name), _batches(name, directory / f"{name}.parquet"))
        for name in names
        if name in TABLES
    }
    store.write(tables)


def _batches(name: str, path: Path) -> Iterator[pa.RecordBatch]:
    schema = arrow_schema(name)
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            columns = [
                batch[field.name].cast(field.type)
                if field.name in batch.schema.names
                else pa.nulls(len(batch), field.type)
                for field in schema
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)
