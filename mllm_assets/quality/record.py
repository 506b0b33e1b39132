"""Write an assessment into DuckDB: read from its files, streamed as Arrow, in one transaction."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from mllm_assets.artifacts import read_manifest
from mllm_assets.data.raw_files import SAMPLES_FILE
from mllm_assets.quality.files import DUPLICATES_FILE, IMAGES_FILE, QUALITY_FILE
from mllm_assets.quality.schema import TABLES
from mllm_assets.quality.store import CONFIG, QualityStore, arrow_schema, table_for, utc_now

BATCH_ROWS = 16_384
# what each table takes from the files; the other columns are the same in every row
_SOURCES = {
    "samples": "SELECT sample_rows.*, caption, label, len(image_ids) AS num_images FROM sample_rows "
    "JOIN texts USING (sample_id)",
    "sample_versions": "SELECT * FROM texts",
    "images": "SELECT sample_id, unnest(image_ids) AS image_sha256, "
    "generate_subscripts(image_ids, 1) - 1 AS image_index FROM sample_rows",
    "image_quality": "SELECT * FROM image_rows",
    "caption_quality": "SELECT * FROM sample_rows WHERE caption_sha256 IS NOT NULL",
    "verdicts": "SELECT * FROM sample_rows",
    "duplicate_pairs": "SELECT * FROM pair_rows",
}


def define_rows(connection: duckdb.DuckDBPyConnection, raw: Path, quality: Path) -> None:
    """The views `texts`, `sample_rows`, `image_rows` and `pair_rows` over the files of an assessment."""
    files = {
        "texts": raw / SAMPLES_FILE,
        "sample_rows": quality / QUALITY_FILE,
        "image_rows": quality / IMAGES_FILE,
        "pair_rows": quality / DUPLICATES_FILE,
    }
    texts = "sample_id, row_index, caption, label, source_location"
    for name, path in files.items():
        columns = texts if name == "texts" else "*"
        quoted = str(path).replace("'", "''")
        connection.execute(f"CREATE VIEW {name} AS SELECT {columns} FROM read_parquet('{quoted}')")


def record(store: QualityStore, raw: Path, quality: Path, run_id: str) -> None:
    """Add a finished assessment to the tables of `schema`; doing it again changes nothing."""
    manifest = read_manifest(quality)
    constants = {
        "dataset": manifest["dataset"],
        "run_id": run_id,
        "raw_digest": manifest["raw_digest"],
        "quality_digest": manifest["digest"],
        "probe_version": manifest["probe_version"],
    }
    judged = {
        **constants,
        "thresholds": json.dumps(manifest["spec"]),
        "num_samples": manifest["num_samples"],
        "num_rejected": manifest["num_rejected"],
        "num_duplicates": manifest["num_duplicates"],
        "written_at": utc_now(),
    }
    with duckdb.connect(config=CONFIG) as connection:
        define_rows(connection, raw, quality)
        tables: dict[str, pa.Table | pa.RecordBatchReader] = {"assessments": table_for("assessments", [judged])}
        for name, sql in _SOURCES.items():
            schema = arrow_schema(name)
            given = {column: constants[column] for column in schema.names if column in constants}
            taken = [
                f'CAST("{column}" AS {TABLES[name].columns[column]}) AS "{column}"'
                for column in schema.names
                if column not in given
            ]
            query = f"SELECT {', '.join([*taken, *(f'? AS {column}' for column in given)])} FROM ({sql})"
            batches = _batches(connection, query, list(given.values()), schema)
            tables[name] = pa.RecordBatchReader.from_batches(schema, batches)
        store.write(tables)


def _batches(
    connection: duckdb.DuckDBPyConnection, query: str, constants: list[Any], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Run a query when the first batch is asked for: of several, one at a time is in memory."""
    with connection.cursor() as cursor:
        for batch in cursor.sql(query, params=constants).to_arrow_reader(BATCH_ROWS):
            yield batch.select(schema.names).cast(schema)
