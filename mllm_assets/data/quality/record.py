"""Write an assessment into DuckDB: read from its files, streamed as Arrow, in one transaction."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.artifacts import (
    digest_json,
    is_sound,
    publish,
    read_manifest,
    sha256_file,
    staging_directory,
    write_manifest,
)
from mllm_assets.data.ingest.raw_files import SAMPLES_FILE
from mllm_assets.data.quality.groups import DUPLICATES_FILE, IMAGES_FILE, QUALITY_FILE
from mllm_assets.data.quality.schema import SCHEMA_VERSION, TABLES
from mllm_assets.data.quality.store import CONFIG, QualityStore, arrow_schema, table_for, utc_now
from mllm_assets.errors import IntegrityError
from mllm_assets.progress import doing

BATCH_ROWS = 16_384
# what each table takes from the files; the other columns are constant
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
KIND = "quality_history"
# rows keyed by content belong to every dataset with that content
_CONTENT = {
    "image_quality": "image_sha256 IN (SELECT image_sha256 FROM images WHERE dataset = ?)",
    "caption_quality": "caption_sha256 IN (SELECT caption_sha256 FROM samples WHERE dataset = ?)",
}


def define_rows(connection: duckdb.DuckDBPyConnection, raw: Path, quality: Path) -> None:
    """The views `texts`, `sample_rows`, `image_rows` and `pair_rows` over the files of an assessment."""
    files = {
        "texts": raw / SAMPLES_FILE,
        "sample_rows": quality / QUALITY_FILE,
        "image_rows": quality / IMAGES_FILE,
        "pair_rows": quality / DUPLICATES_FILE,
    }
    texts = "sample_id, row_index, caption, label, source_location, source_id, source_detail"
    for name, path in files.items():
        columns = texts if name == "texts" else "*"
        quoted = str(path).replace("'", "''")
        connection.execute(f"CREATE VIEW {name} AS SELECT {columns} FROM read_parquet('{quoted}')")


@doing("write the quality database")
def record(store: QualityStore, raw: Path, quality: Path, run_id: str) -> None:
    """Add a finished assessment to the tables of `schema`; repeating it changes nothing."""
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
    """Run a query when its first batch is needed, so that only one result is in memory."""
    with connection.cursor() as cursor:
        for batch in cursor.sql(query, params=constants).to_arrow_reader(BATCH_ROWS):
            yield batch.select(schema.names).cast(schema)


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
        write_manifest(staging, {"kind": KIND, "dataset": dataset, "schema_version": SCHEMA_VERSION})
        publish(staging, parent / digest)
    return parent / digest


def read_history(store: QualityStore, dataset: str, directory: Path) -> None:
    """Add the rows of `write_history` to the database; existing ones change nothing.

    Tables and columns that this version does not know are ignored; those that the writer did not know are null.

    Raises:
        IntegrityError: It is not the history of this dataset, or cannot be read; nothing was added.
    """
    manifest = read_manifest(directory)
    names = [name.removesuffix(".parquet") for name in manifest["files"]]
    paths = {name: directory / f"{name}.parquet" for name in names if name in TABLES}
    try:
        if [manifest["kind"], manifest["dataset"]] != [KIND, dataset]:
            raise ValueError(f"it is the {manifest['kind']} of {manifest['dataset']!r}")
        for name, path in paths.items():
            for batch in _file_batches(name, path):
                if "dataset" in batch.schema.names and set(batch["dataset"].to_pylist()) - {dataset}:
                    raise ValueError(f"{path.name} holds rows of another dataset")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise IntegrityError(
            f"What the artefact store has as the history of {dataset!r} is not that ({str(error).splitlines()[0]}), "
            f"so nothing of it was read. Delete pointers/history/{dataset}.json there; {dataset}/train sends another."
        ) from None
    store.write(
        {
            name: pa.RecordBatchReader.from_batches(arrow_schema(name), _file_batches(name, path))
            for name, path in paths.items()
        }
    )


def delete_others(directory: Path) -> None:
    """Delete the other histories in the same folder: this one includes them."""
    for path in directory.parent.iterdir():
        if path != directory and not path.is_symlink() and is_sound(path) and read_manifest(path).get("kind") == KIND:
            shutil.rmtree(path)


def _file_batches(name: str, path: Path) -> Iterator[pa.RecordBatch]:
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
