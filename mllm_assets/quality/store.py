"""The DuckDB file: computed outside, written in one short transaction under a lock beside the database.

DuckDB lets one process open a file for writing and refuses any other meanwhile, readers included. All access from
this project therefore goes through the file lock; a lock error from someone else (an open `duckdb` shell) is
retried with jitter for `timeout_s`.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
from filelock import FileLock, Timeout

from mllm_assets.errors import IntegrityError, MachineError
from mllm_assets.quality.schema import SCHEMA_VERSION, TABLES

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class QualityStore:
    """Every sample's quality, predictions and metrics in one file; see `schema.TABLES`."""

    path: Path
    timeout_s: float = 120.0

    def write(self, tables: Mapping[str, pa.Table]) -> None:
        """Replace the rows that have the same keys, all tables in one transaction. Writing twice changes nothing.

        Raises:
            MachineError: Someone else held the database for longer than `timeout_s`.
            IntegrityError: The file was written by a newer version, or is not a database.
        """
        prepared = {name: _fitted(name, table) for name, table in tables.items()}

        def transaction(connection: duckdb.DuckDBPyConnection) -> None:
            connection.begin()
            for name, table in prepared.items():
                connection.register("incoming", table)
                same = " AND ".join(f'"{name}"."{column}" = incoming."{column}"' for column in TABLES[name].key)
                connection.execute(f'DELETE FROM "{name}" USING incoming WHERE {same}')
                connection.execute(f'INSERT INTO "{name}" BY NAME SELECT * FROM incoming')
                connection.unregister("incoming")
            connection.commit()

        self._locked(transaction, read_only=False)

    def query(self, sql: str, params: Sequence[Any] | Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Rows of a read-only query, a dict each."""

        def read(connection: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
            cursor = connection.cursor().execute(sql, params)
            names = [column[0] for column in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

        if not self.path.exists():
            self._locked(lambda connection: None, read_only=False)
        return self._locked(read, read_only=True)

    def _locked(self, action: Callable[[duckdb.DuckDBPyConnection], T], *, read_only: bool) -> T:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + self.timeout_s
        try:
            with FileLock(f"{self.path}.lock", timeout=self.timeout_s):
                connection = self._connect(deadline, read_only=read_only)
                with connection:
                    if not read_only:
                        _ensure_schema(connection, self.path)
                    return action(connection)
        except Timeout:
            raise self._busy() from None

    def _connect(self, deadline: float, *, read_only: bool) -> duckdb.DuckDBPyConnection:
        pause_s = 0.02
        while True:
            try:
                return duckdb.connect(str(self.path), read_only=read_only)
            except duckdb.IOException as error:
                if "lock" not in str(error).lower():
                    raise self._unreadable(error) from error
                if time.monotonic() > deadline:
                    raise self._busy() from error
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, 1.0)

    def _busy(self) -> MachineError:
        return MachineError(
            f"{self.path} was in use by another program for more than {self.timeout_s:g} s. Close what has it open "
            "(for example a duckdb shell) and run again."
        )

    def _unreadable(self, error: Exception) -> IntegrityError:
        return IntegrityError(
            f"{self.path} cannot be opened as a DuckDB database ({str(error).splitlines()[0]}). Move it away and "
            "materialise the sample_quality assets again."
        )


def _fitted(name: str, table: pa.Table) -> pa.Table:
    """Check a table against the schema, and keep the last of rows that have the same key."""
    schema = TABLES[name]
    assert set(table.column_names) == set(schema.columns), (name, table.column_names)
    keys = zip(*(table[column].to_pylist() for column in schema.key), strict=True)
    last = {key: index for index, key in enumerate(keys)}
    return table if len(last) == table.num_rows else table.take(sorted(last.values()))


def _ensure_schema(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER, applied_at TIMESTAMP)")
    found = connection.execute("SELECT max(version) FROM schema_version").fetchone()
    version = found[0] if found else None
    if version is not None and version > SCHEMA_VERSION:
        raise IntegrityError(
            f"{path} has schema version {version}, but this mllm_assets knows {SCHEMA_VERSION}. Upgrade mllm_assets."
        )
    if version is None:
        connection.begin()
        for name, table in TABLES.items():
            connection.execute(table.ddl(name))
        connection.execute("INSERT INTO schema_version VALUES (?, ?)", [SCHEMA_VERSION, utc_now()])
        connection.commit()


def utc_now() -> datetime:
    """The time as the TIMESTAMP columns hold it: UTC without a zone."""
    return datetime.now(UTC).replace(tzinfo=None)


def table_for(name: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as an Arrow table with exactly the columns and types of a table of the store; missing values are null."""
    kinds = {
        "VARCHAR": pa.string(),
        "JSON": pa.string(),
        "INTEGER": pa.int32(),
        "BIGINT": pa.int64(),
        "UBIGINT": pa.uint64(),
        "DOUBLE": pa.float64(),
        "BOOLEAN": pa.bool_(),
        "TIMESTAMP": pa.timestamp("us"),
    }
    schema = pa.schema([pa.field(column, kinds[kind]) for column, kind in TABLES[name].columns.items()])
    return pa.Table.from_pylist([{key: row.get(key) for key in schema.names} for row in rows], schema=schema)
