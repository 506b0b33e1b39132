"""The DuckDB file: computed outside, written in one short transaction under a lock beside the database.

DuckDB lets one process open a file for writing and refuses any other meanwhile, readers included. All access from
this project therefore goes through the file lock; a lock error from someone else (an open `duckdb` shell) is
retried with jitter for `timeout_s`. Every write leaves a copy of the finished file beside it, and a reader that
cannot get at the database within `patience_s` is served from that copy.
"""

import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
from filelock import FileLock, Timeout

from mllm_assets.errors import IntegrityError, MachineError
from mllm_assets.quality.migrations import migrate, refuse_newer, schema_version, utc_now
from mllm_assets.quality.schema import SCHEMA_VERSION, TABLES, TableSchema

__all__ = ["QualityStore", "table_for", "utc_now"]
T = TypeVar("T")
Params = Sequence[Any] | Mapping[str, Any] | None
# What does not fit is written to a folder beside the file. One thread: each has row groups of its own in memory.
CONFIG: dict[str, str | bool | int | float | list[str]] = {"memory_limit": "64MB", "threads": 1}
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


@dataclass(frozen=True, slots=True)
class QualityStore:
    """Every sample's quality, predictions and metrics in one file; see `schema.TABLES` and `views.VIEWS`."""

    path: Path
    timeout_s: float = 120.0
    patience_s: float = 3.0

    @property
    def snapshot(self) -> Path:
        """The database as the last write left it."""
        return self.path.with_name(f".{self.path.name}.snapshot")

    def write(self, tables: Mapping[str, pa.Table | pa.RecordBatchReader]) -> None:
        """Add rows to several tables in one transaction. Writing twice changes nothing.

        A row whose key is there already replaces the old one, or is left out where the table keeps the first
        (`schema.TableSchema`). When this returns the rows are on the disk.

        Args:
            tables: Table name -> rows with exactly its columns. A reader is read once, batch by batch.

        Raises:
            MachineError: Someone else held the database for longer than `timeout_s`.
            IntegrityError: The file was written by a newer version, or is not a database.
        """
        for name, rows in tables.items():
            assert set(rows.schema.names) == set(TABLES[name].columns), (name, rows.schema.names)

        def transaction(connection: duckdb.DuckDBPyConnection) -> None:
            connection.begin()
            for name, rows in tables.items():
                _write_rows(connection, name, TABLES[name], rows)
            connection.commit()

        self._writing(transaction)

    def query(self, sql: str, params: Params = None) -> list[dict[str, Any]]:
        """Rows of a read-only query, a dict each; raises as `query_arrow`."""
        return self.query_arrow(sql, params).to_pylist()

    def query_arrow(self, sql: str, params: Params = None, *, given: Mapping[str, pa.Table] | None = None) -> pa.Table:
        """Rows of a read-only query as an Arrow table; it may name the tables that are `given` with it.

        Raises:
            MachineError: The database was in use for longer than `timeout_s`, and there is no copy of it yet.
            IntegrityError: As `write`.
        """

        def read(connection: duckdb.DuckDBPyConnection) -> pa.Table:
            cursor = connection.cursor()
            for name, table in (given or {}).items():
                cursor.register(name, table)
            return cursor.sql(sql, params=params).to_arrow_table()

        try:
            return self._reading(read)
        except MachineError:
            if not self.snapshot.exists():
                raise
        with duckdb.connect(str(self.snapshot), read_only=True, config=CONFIG) as connection:
            return read(connection)

    def _writing(self, action: Callable[[duckdb.DuckDBPyConnection], T]) -> T:
        with self._opened(self.timeout_s, read_only=False) as connection:
            migrate(connection, self.path)
            result = action(connection)
            connection.execute("CHECKPOINT")
            # Closing a handle of a file drops this process's own lock on it, so the copy comes last.
            temporary = self.snapshot.with_suffix(".tmp")
            shutil.copyfile(self.path, temporary)
            temporary.replace(self.snapshot)
        return result

    def _reading(self, action: Callable[[duckdb.DuckDBPyConnection], T]) -> T:
        while True:
            if self.path.exists():
                wait_s = self.patience_s if self.snapshot.exists() else self.timeout_s
                with self._opened(min(wait_s, self.timeout_s), read_only=True) as connection:
                    version = schema_version(connection)
                    refuse_newer(version, self.path)
                    if version == SCHEMA_VERSION:
                        return action(connection)
            self._writing(lambda connection: None)

    @contextmanager
    def _opened(self, wait_s: float, *, read_only: bool) -> Iterator[duckdb.DuckDBPyConnection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait_s
        lock = FileLock(f"{self.path}.lock")
        try:
            lock.acquire(timeout=wait_s)
        except Timeout:
            raise self._busy(wait_s) from None
        try:
            with self._connect(deadline, wait_s, read_only=read_only) as connection:
                yield connection
        finally:
            lock.release()

    def _connect(self, deadline: float, wait_s: float, *, read_only: bool) -> duckdb.DuckDBPyConnection:
        pause_s = 0.02
        while True:
            try:
                return duckdb.connect(str(self.path), read_only=read_only, config=CONFIG)
            except duckdb.IOException as error:
                if "lock" not in str(error).lower():
                    raise self._unreadable(error) from error
                if time.monotonic() > deadline:
                    raise self._busy(wait_s) from error
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, 1.0)

    def _busy(self, wait_s: float) -> MachineError:
        return MachineError(
            f"{self.path} was in use by another program for more than {wait_s:g} s. Close what has it open "
            "(for example a duckdb shell) and run again."
        )

    def _unreadable(self, error: Exception) -> IntegrityError:
        return IntegrityError(
            f"{self.path} cannot be opened as a DuckDB database ({str(error).splitlines()[0]}). Move it away and "
            "materialise the sample_quality assets again."
        )


def _write_rows(
    connection: duckdb.DuckDBPyConnection, name: str, table: TableSchema, rows: pa.Table | pa.RecordBatchReader
) -> None:
    """Stage the rows, so that a reader is read once; of rows with one key in one write the last counts."""
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
    """The columns of a table of the store as Arrow has them."""
    return pa.schema([pa.field(column, ARROW_TYPES[kind]) for column, kind in TABLES[name].columns.items()])
