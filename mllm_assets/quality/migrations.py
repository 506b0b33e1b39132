"""Bring a DuckDB file of any earlier schema version to this one, in place and in one transaction.

A step is a list of SQL statements and is never changed once released. A changed table or saved view needs a new
`SCHEMA_VERSION` and a step to it (an empty one for views, which are written anew after the last step).
"""

from datetime import UTC, datetime
from pathlib import Path

import duckdb

from mllm_assets.errors import IntegrityError
from mllm_assets.quality.schema import SCHEMA_VERSION, TABLES
from mllm_assets.quality.views import VIEWS

# Version 1 kept the last verdicts only, under the names that are views now.
_TO_2 = [
    "ALTER TABLE samples RENAME TO samples_1",
    """CREATE TABLE samples AS SELECT DISTINCT ON (dataset, sample_id)
        dataset, sample_id, num_images, caption, sha256(caption) AS caption_sha256, label, run_id FROM samples_1""",
    "CREATE TABLE sample_versions AS SELECT dataset, raw_digest, sample_id, row_index, run_id FROM samples_1",
    "DROP TABLE samples_1",
    "ALTER TABLE image_quality ADD COLUMN is_grayscale BOOLEAN",
    "ALTER TABLE caption_quality RENAME TO caption_quality_1",
    """CREATE TABLE caption_quality AS SELECT DISTINCT ON (caption_sha256)
        caption_sha256, 1::INTEGER AS probe_version, caption_num_chars, caption_num_words, caption_num_unique_words,
        NULL::INTEGER AS caption_num_tokens, NULL::DOUBLE AS caption_repeated_share, caption_ascii_share, old.run_id
        FROM caption_quality_1 old JOIN samples USING (dataset, sample_id) WHERE caption_sha256 IS NOT NULL""",
    "DROP TABLE caption_quality_1",
    "ALTER TABLE duplicates RENAME TO duplicate_pairs",
    """CREATE TABLE verdicts AS SELECT dataset, quality_digest, sample_id, row_index, reason AS reject_reason,
        NULL::VARCHAR[] AS flags, NULL::VARCHAR AS duplicate_group, NULL::BIGINT AS group_size, run_id FROM rejects""",
    "DROP TABLE rejects",
    """CREATE TABLE assessments AS
        WITH found AS (
            SELECT dataset, quality_digest, run_id FROM verdicts
            UNION SELECT dataset, quality_digest, run_id FROM duplicate_pairs)
        SELECT DISTINCT ON (found.dataset, found.run_id)
            found.dataset, found.run_id, found.quality_digest, NULL::VARCHAR AS raw_digest,
            1::INTEGER AS probe_version, NULL::JSON AS thresholds, NULL::BIGINT AS num_samples,
            (SELECT count(*) FROM verdicts v
                WHERE (v.dataset, v.quality_digest) = (found.dataset, found.quality_digest)) AS num_rejected,
            NULL::BIGINT AS num_duplicates, coalesce(runs.created_at, TIMESTAMP '1970-01-01') AS written_at
        FROM found LEFT JOIN runs ON runs.run_id = found.run_id AND runs.digest = found.quality_digest
            AND runs.asset = found.dataset || '/sample_quality'""",
]
_TO_3 = ["ALTER TABLE image_quality ADD COLUMN num_frames INTEGER"]
_TO_5 = [
    "ALTER TABLE predictions ADD COLUMN label VARCHAR",
    "ALTER TABLE predictions ADD COLUMN num_answer_tokens INTEGER",
    "ALTER TABLE predictions ADD COLUMN metrics JSON",
]
# an empty file was called a missing one, and what is known of its bytes is not measured again
_TO_6 = [
    "ALTER TABLE sample_versions ADD COLUMN source_location VARCHAR",
    "UPDATE image_quality SET defect = 'image_empty' WHERE num_bytes = 0",
]
STEPS: dict[int, list[str]] = {2: _TO_2, 3: _TO_3, 4: [], 5: _TO_5, 6: _TO_6}


def schema_version(connection: duckdb.DuckDBPyConnection) -> int | None:
    """The version of a file, None of one that is new."""
    if not connection.execute("FROM duckdb_tables() WHERE table_name = 'schema_version'").fetchall():
        return None
    return connection.execute("SELECT max(version) FROM schema_version").fetchall()[0][0]


def refuse_newer(version: int | None, path: Path) -> None:
    """Raise IntegrityError for a file that a later mllm_assets wrote."""
    if version is not None and version > SCHEMA_VERSION:
        raise IntegrityError(
            f"{path} has schema version {version}, but this mllm_assets knows {SCHEMA_VERSION}. Upgrade mllm_assets."
        )


def migrate(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Create or bring up to date all tables and saved views; a file that is up to date is only looked at.

    Raises:
        IntegrityError: The file is of a newer version.
    """
    version = schema_version(connection)
    refuse_newer(version, path)
    if version == SCHEMA_VERSION:
        return
    connection.begin()
    try:
        connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER, applied_at TIMESTAMP)")
        for step in range((version or SCHEMA_VERSION) + 1, SCHEMA_VERSION + 1):
            for statement in STEPS[step]:
                connection.execute(statement)
        for name, table in TABLES.items():
            connection.execute(table.ddl(name))
        for name, sql in VIEWS.items():
            connection.execute(f'CREATE OR REPLACE VIEW "{name}" AS {sql}')
        connection.execute("INSERT INTO schema_version VALUES (?, ?)", [SCHEMA_VERSION, utc_now()])
        connection.commit()
    except BaseException:  # Ctrl-C too: half a migration must not stay open on the connection
        connection.rollback()
        raise


def utc_now() -> datetime:
    """The time as the TIMESTAMP columns hold it: UTC without a zone."""
    return datetime.now(UTC).replace(tzinfo=None)
