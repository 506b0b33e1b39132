"""The DuckDB store: idempotent, one transaction, readable by anyone."""

from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pytest
from filelock import FileLock

from mllm_assets.data.quality import damage
from mllm_assets.data.quality.schema import SCHEMA_VERSION, TABLES
from mllm_assets.data.quality.store import QualityStore, copied_once, table_for
from mllm_assets.errors import IntegrityError, MachineError

pytestmark = pytest.mark.not_fast


def metric(value: float, **fields: Any) -> dict[str, Any]:
    row = {"run_id": "r1", "recipe": "emoji_sft", "checkpoint_digest": "c", "model": "tuned", "entry": "emoji_val"}
    return {**row, "metric": "loss", "value": value, "num_samples": 120, **fields}


def test_a_fresh_store_has_every_table_and_no_rows(tmp_path: Path) -> None:
    store = QualityStore(tmp_path / "data" / "quality.duckdb")
    assert [store.query(f"SELECT * FROM {name}") for name in TABLES] == [[]] * len(TABLES)
    assert store.query("SELECT max(version) AS version FROM schema_version") == [{"version": SCHEMA_VERSION}]


def test_writing_twice_changes_nothing_and_a_later_write_wins(tmp_path: Path) -> None:
    store = QualityStore(tmp_path / "quality.duckdb")
    for value in (0.5, 0.5, 0.4):
        store.write({"eval_metrics": table_for("eval_metrics", [metric(value), metric(0.9, metric="bleu")])})
    rows = store.query("SELECT metric, value FROM eval_metrics ORDER BY metric")
    assert rows == [{"metric": "bleu", "value": 0.9}, {"metric": "loss", "value": 0.4}]


def test_of_rows_with_one_key_in_one_write_the_last_stays(tmp_path: Path) -> None:
    store = QualityStore(tmp_path / "quality.duckdb")
    store.write({"eval_metrics": table_for("eval_metrics", [metric(0.1), metric(0.2)])})
    assert store.query("SELECT value FROM eval_metrics") == [{"value": 0.2}]


def test_all_tables_are_written_or_none(tmp_path: Path) -> None:
    """A torn write would leave samples whose quality is unknown."""
    store = QualityStore(tmp_path / "quality.duckdb")
    good = table_for("eval_metrics", [metric(0.1)])
    bad = table_for("runs", [{"run_id": "r", "asset": "a", "metadata": "{not json"}])
    with pytest.raises(duckdb.Error):
        store.write({"eval_metrics": good, "runs": bad})
    assert store.query("SELECT * FROM eval_metrics") == []


def test_parameters_times_and_json_come_back(tmp_path: Path) -> None:
    store = QualityStore(tmp_path / "quality.duckdb")
    at = datetime(2026, 1, 2, 3, 4, 5)
    row = {"run_id": "r", "asset": "emoji/raw", "digest": "d", "created_at": at, "metadata": '{"n": 1}'}
    store.write({"runs": table_for("runs", [row])})
    assert store.query("SELECT created_at, metadata->>'n' AS n FROM runs WHERE asset = ?", ["emoji/raw"]) == [
        {"created_at": at, "n": "1"}
    ]


def test_a_query_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(duckdb.Error, match="read-only"):
        QualityStore(tmp_path / "quality.duckdb").query("DELETE FROM runs")


def test_a_file_of_a_newer_version_is_not_touched(tmp_path: Path) -> None:
    store = QualityStore(tmp_path / "quality.duckdb")
    store.query("SELECT 1")
    with duckdb.connect(str(store.path)) as connection:
        connection.execute("INSERT INTO schema_version VALUES (99, NULL)")
    before = store.path.read_bytes()
    for use in (lambda: store.write({}), lambda: store.query("SELECT 1")):
        with pytest.raises(IntegrityError, match=f"schema version 99, but this mllm_assets knows {SCHEMA_VERSION}. Up"):
            use()
    assert store.path.read_bytes() == before


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "quality.duckdb"
    path.write_text("not a database at all" * 1000)
    with pytest.raises(IntegrityError, match="cannot be read as a DuckDB database.*doctor --repair"):
        QualityStore(path).query("SELECT 1")


def test_a_lock_that_is_never_released_says_what_to_close(tmp_path: Path) -> None:
    from filelock import FileLock

    store = QualityStore(tmp_path / "quality.duckdb", timeout_s=0.2)
    store.query("SELECT 1")
    with (
        FileLock(f"{store.path}.lock"),
        pytest.raises(MachineError, match="in use by another program for more than 0.2 s. Close what has it open"),
    ):
        store.write({})


def test_the_writes_of_a_run_leave_one_copy_and_are_compared_with_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of a dozen writes read the file and its copy and wrote the copy, which takes as long as they are large."""
    store = QualityStore(tmp_path / "quality.duckdb", timeout_s=0.2, patience_s=0.1)
    store.write({"eval_metrics": table_for("eval_metrics", [metric(0.1)])})
    hashed, copied = list[Path](), store.snapshot.stat().st_ino
    sha256 = damage.sha256_file
    monkeypatch.setattr(damage, "sha256_file", lambda path: hashed.append(path) or sha256(path))
    with copied_once():
        with copied_once():
            store.write({"eval_metrics": table_for("eval_metrics", [metric(0.2)])})
        QualityStore(store.path, query_memory="64MB").write({"eval_metrics": table_for("eval_metrics", [metric(0.3)])})
        assert store.snapshot.stat().st_ino == copied
        assert store.query("SELECT value FROM eval_metrics") == [{"value": 0.3}]
        with FileLock(f"{store.path}.lock"), pytest.raises(MachineError, match="was in use by another program"):
            store.query("FROM eval_metrics")  # not the copy, which lacks what this run wrote
    assert hashed == [store.path, store.snapshot]
    with duckdb.connect(str(store.snapshot), read_only=True) as connection:
        assert connection.execute("SELECT value FROM eval_metrics").fetchall() == [(0.3,)]
