"""The DuckDB file: computed outside, written in one short transaction under a lock beside the database.

DuckDB lets one process open a file for writing and refuses all others meanwhile, readers included. All access from
this project therefore goes through the file lock; a lock error from someone else (an open `duckdb` shell) is
retried with jitter for `timeout_s`. Every run, and every write outside of one, leaves a copy of the finished file
beside it, and a reader that cannot open the database within `patience_s` reads that copy.
"""

import logging
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from filelock import FileLock, Timeout

from mllm_assets.data.ingest.flags import PROBES
from mllm_assets.data.quality.damage import DamagedDatabase, may_be_damage, restore_if_damaged, unreadable
from mllm_assets.data.quality.schema import SCHEMA_VERSION, TABLES, TableSchema
from mllm_assets.data.quality.views import VIEWS, view_sql
from mllm_assets.disk import full_disk_is_an_error, is_full_disk
from mllm_assets.errors import IntegrityError, MachineError

log = logging.getLogger(__name__)
Params = Sequence[Any] | Mapping[str, Any] | None
# What does not fit is written to a folder next to the file. One thread: each has row groups of its own in memory.
CONFIG: dict[str, str | bool | int | float | list[str]] = {"memory_limit": "256MB", "threads": 1}
ARROW_TYPES = {
    "VARCHAR": pa.string(),
    "VARCHAR[]": pa.list_(pa.string()),
    "JSON": pa.string(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "UBIGINT": pa.uint64(),
    "DOUBLE": pa.float64(),
    "BOOLEAN": pa.bool_(),
    "TIMESTAMP": pa.timestamp("us"),
}
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


@dataclass(frozen=True, slots=True)
class QualityStore:
    """Every sample's quality, predictions and metrics in one file; see `schema.TABLES` and `views.VIEWS`."""

    path: Path
    timeout_s: float = 120.0
    patience_s: float = 3.0
    query_memory: str | None = None  # what a query may take, if not what a write may

    @property
    def snapshot(self) -> Path:
        """The database as the last write left it, or the last run: see `copied_once`."""
        return self.path.with_name(f".{self.path.name}.snapshot")

    @property
    def _is_ahead(self) -> bool:
        """Whether the copy lacks what this process wrote."""
        return any(self.path in written for written in _blocks)

    def write(self, tables: Mapping[str, pa.Table | pa.RecordBatchReader]) -> None:
        """Add rows to several tables in one transaction. Writing twice changes nothing.

        A row has exactly its table's columns; one with an existing key replaces the old one, or is ignored where the
        table keeps the first. A reader is read once, batch by batch. When this returns, the rows are on disk.

        Raises:
            MachineError: Someone else held the database for longer than `timeout_s`, or the disk is full.
            IntegrityError: The file was written by a newer version, or is not a database.
        """
        for name, rows in tables.items():
            assert set(rows.schema.names) == set(TABLES[name].columns), (name, rows.schema.names)
        with full_disk_is_an_error(self.path.parent) as outcome:
            outcome.text = f"Nothing was added to {self.path.name}."
            with self._opened(self.timeout_s, read_only=False, check=not self._is_ahead) as connection:
                migrate(connection, self.path)
                connection.begin()
                for name, rows in tables.items():
                    _write_rows(connection, name, TABLES[name], rows)
                connection.commit()
                outcome.text = f"The rows are in {self.path.name}, but not yet in {self.snapshot.name} beside it."
                connection.execute("CHECKPOINT")
                if _blocks:
                    _blocks[-1][self.path] = self
                else:
                    self._copy(outcome.text)

    def query(self, sql: str, params: Params = None) -> list[dict[str, Any]]:
        """Rows of a read-only query, a dict each; raises like `query_arrow`."""
        return self.query_arrow(sql, params).to_pylist()

    def query_arrow(self, sql: str, params: Params = None, *, given: Mapping[str, pa.Table] | None = None) -> pa.Table:
        """Rows of a read-only query as an Arrow table; it may use the tables in `given`.

        Raises:
            MachineError: The database was in use for longer than `timeout_s`, and has no copy yet.
            IntegrityError: As `write`.
        """

        def read(connection: duckdb.DuckDBPyConnection) -> pa.Table:
            cursor = connection.cursor()
            if self.query_memory is not None:
                cursor.execute(f"SET memory_limit = '{self.query_memory}'")
            for name, table in (given or {}).items():
                cursor.register(name, table)
            return cursor.sql(sql, params=params).to_arrow_table()

        try:
            return self._reading(read)
        except MachineError:
            if self._is_ahead or not self.snapshot.exists():
                raise
        with duckdb.connect(str(self.snapshot), read_only=True, config=CONFIG) as connection:
            return read(connection)

    def copy(self) -> None:
        """Leave a copy of the finished file; raises as `write`."""
        with self._opened(self.timeout_s, read_only=True, check=False):
            self._copy(f"The rows are in {self.path.name}.")

    def _copy(self, outcome: str) -> None:
        """Closing a handle of a file drops this process's own lock on it, so the copy comes last.

        Raises:
            MachineError: It could not be written, for another reason than a full disk. Says that the rows are written.
        """
        try:
            with self._beside() as temporary:
                shutil.copyfile(self.path, temporary)
                temporary.replace(self.snapshot)
        except OSError as error:
            if is_full_disk(error):
                raise
            cure = f"Make {self.snapshot.parent} writable"
            if self.snapshot.is_dir():
                cure = "Run mllm-assets doctor --repair, which moves the folder of that name aside,"
            raise MachineError(
                f"{self.snapshot}, which others read while the database is in use, cannot be written ({error}). "
                f"{outcome} {cure} and run again: writing twice changes nothing."
            ) from error

    def _reading(self, action: Callable[[duckdb.DuckDBPyConnection], pa.Table]) -> pa.Table:
        check = False  # it takes longer than most queries
        while True:
            if self.path.exists():
                wait_s = self.patience_s if self.snapshot.exists() and not self._is_ahead else self.timeout_s
                try:
                    with self._opened(min(wait_s, self.timeout_s), read_only=True, check=check) as connection:
                        if schema_version(connection, self.path) == SCHEMA_VERSION:
                            return action(connection)
                except DamagedDatabase:
                    if check:
                        raise
                    check = True
                    continue
            self.write({})  # creates, restores or migrates it

    @contextmanager
    def _opened(self, wait_s: float, *, read_only: bool, check: bool) -> Iterator[duckdb.DuckDBPyConnection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait_s
        lock = FileLock(f"{self.path}.lock")
        try:
            lock.acquire(timeout=wait_s)
        except Timeout:
            raise self._busy(wait_s) from None
        try:
            if check:
                restore_if_damaged(self.path, self.snapshot)
            if not read_only and not self.path.exists():
                self._create()
            with self._connect(deadline, wait_s, read_only=read_only) as connection:
                yield connection
        except duckdb.Error as error:
            if may_be_damage(error):
                raise unreadable(self.path, error) from error
            raise
        finally:
            lock.release()

    def _create(self) -> None:
        """Make an empty database beside it first: one that a full disk or a kill left half-written is not opened."""
        with self._beside() as temporary:
            with duckdb.connect(str(temporary), config=CONFIG) as connection:
                migrate(connection, self.path)
            temporary.replace(self.path)

    @contextmanager
    def _beside(self) -> Iterator[Path]:
        """A name for a file that takes another's place once it is whole; `mllm-assets gc` knows it."""
        for leftover in self.path.parent.glob(f".{self.path.name}.*tmp*"):  # of a process that was killed
            if not leftover.is_dir():  # as the copy may be that a repair has moved aside
                leftover.unlink()
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            yield temporary
        finally:
            for path in (temporary, temporary.with_name(f"{temporary.name}.wal")):
                path.unlink(missing_ok=True)

    def _connect(self, deadline: float, wait_s: float, *, read_only: bool) -> duckdb.DuckDBPyConnection:
        pause_s = 0.02
        while True:
            try:
                return duckdb.connect(str(self.path), read_only=read_only, config=CONFIG)
            except duckdb.IOException as error:
                if may_be_damage(error):
                    raise
                if "lock" not in str(error).lower():
                    raise MachineError(
                        f"{self.path} cannot be opened ({str(error).splitlines()[0]}). Give this user the right to "
                        "write it, or free space on its disk, and run again."
                    ) from error
                if time.monotonic() > deadline:
                    raise self._busy(wait_s) from error
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, 1.0)

    def _busy(self, wait_s: float) -> MachineError:
        return MachineError(
            f"{self.path} was in use by another program for more than {wait_s:g} s. Close what has it open "
            "(for example a duckdb shell) and run again."
        )


_blocks: list[dict[Path, QualityStore]] = []  # of `copied_once`, the inner one last, with what was written


@contextmanager
def copied_once() -> Iterator[None]:
    """Let all writes of this process leave one copy between them, when the outermost block ends, and compare it once.

    Both take as long as the file is large, and a run writes a dozen times.
    """
    _blocks.append({})
    try:
        yield
    finally:
        written = _blocks.pop()
        if _blocks:
            _blocks[-1].update(written)
        else:
            for store in written.values():
                try:
                    store.copy()
                except (MachineError, OSError) as error:  # the rows are written, and the next write tries again
                    log.warning(str(error))


def _write_rows(
    connection: duckdb.DuckDBPyConnection, name: str, table: TableSchema, rows: pa.Table | pa.RecordBatchReader
) -> None:
    """Stage the rows, so that a reader is read once; of rows with the same key the last one counts."""
    columns = ", ".join(f'"{column}"' for column in table.columns)
    key = ", ".join(f'"{column}"' for column in table.key)
    connection.register("incoming", rows)
    connection.execute(f"CREATE OR REPLACE TEMP TABLE staged AS SELECT {columns} FROM incoming")
    connection.unregister("incoming")
    same = " AND ".join(f'"{name}"."{column}" = staged."{column}"' for column in table.key)
    if not table.keeps_first:
        connection.execute(f'DELETE FROM "{name}" USING staged WHERE {same}')
    connection.execute(
        f'INSERT INTO "{name}" BY NAME SELECT {columns} FROM staged WHERE NOT EXISTS (FROM "{name}" WHERE {same}) '
        f"QUALIFY row_number() OVER (PARTITION BY {key} ORDER BY staged.rowid DESC) = 1"
    )
    connection.execute("DROP TABLE staged")


def table_for(name: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as an Arrow table with exactly the columns and types of a table of the store; missing values are null."""
    schema = arrow_schema(name)
    return pa.Table.from_pylist([{key: row.get(key) for key in schema.names} for row in rows], schema=schema)


def arrow_schema(name: str) -> pa.Schema:
    """The Arrow schema of a table of the store."""
    return pa.schema([pa.field(column, ARROW_TYPES[kind]) for column, kind in TABLES[name].columns.items()])


# the source's own ids, and what a defect is about
_TO_7 = [f"ALTER TABLE sample_versions ADD COLUMN {name} VARCHAR" for name in ("source_id", "source_detail")]
STEPS: dict[int, list[str]] = {2: _TO_2, 3: _TO_3, 4: [], 5: _TO_5, 6: _TO_6, 7: _TO_7, 8: []}


def schema_version(connection: duckdb.DuckDBPyConnection, path: Path) -> int | None:
    """The version of a file, None for a new one.

    Raises:
        IntegrityError: A later mllm_assets wrote the file.
    """
    if not connection.execute("FROM duckdb_tables() WHERE table_name = 'schema_version'").fetchall():
        return None
    version = connection.execute("SELECT max(version) FROM schema_version").fetchall()[0][0]
    if version is not None and version > SCHEMA_VERSION:
        raise IntegrityError(
            f"{path} has schema version {version}, but this mllm_assets knows {SCHEMA_VERSION}. Upgrade mllm_assets."
        )
    return version


def migrate(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Create or bring up to date all tables and saved views; a file that is up to date is not changed.

    Raises:
        IntegrityError: The file is of a newer version.
    """
    version = schema_version(connection, path)
    if version == SCHEMA_VERSION:
        _show_new_probes(connection)
        return
    connection.begin()
    try:
        connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER, applied_at TIMESTAMP)")
        for step in range((version or SCHEMA_VERSION) + 1, SCHEMA_VERSION + 1):
            for statement in STEPS[step]:
                connection.execute(statement)
        for name, table in TABLES.items():
            connection.execute(table.ddl(name))
        for name in VIEWS:
            connection.execute(f'CREATE OR REPLACE VIEW "{name}" AS {view_sql(name)}')
        connection.execute("INSERT INTO schema_version VALUES (?, ?)", [SCHEMA_VERSION, utc_now()])
        connection.commit()
    except BaseException:  # Ctrl-C too: half a migration must not stay open on the connection
        connection.rollback()
        raise


def _show_new_probes(connection: duckdb.DuckDBPyConnection) -> None:
    """Add newly registered quality probes to the views; those of another process are kept."""
    (known,) = connection.execute("SELECT sql FROM duckdb_views() WHERE view_name = 'image_scores'").fetchall()[0]
    if {name for name, probe in PROBES.items() if probe.sql} - set(re.findall(r"\w+", known)):
        for name in ("score_limits", "image_scores"):
            connection.execute(f'CREATE OR REPLACE VIEW "{name}" AS {view_sql(name)}')


def utc_now() -> datetime:
    """The time for TIMESTAMP columns: UTC without a zone."""
    return datetime.now(UTC).replace(tzinfo=None)
