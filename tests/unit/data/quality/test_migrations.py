"""A file of an earlier schema is brought up to date in place; the fixture was written by the code of version 1."""

import gzip
from pathlib import Path

import duckdb
import pytest

from mllm_assets.data.quality import store
from mllm_assets.data.quality.schema import SCHEMA_VERSION, TABLES
from mllm_assets.data.quality.store import ARROW_TYPES, QualityStore
from mllm_assets.data.quality.views import ASKED, VIEWS

pytestmark = pytest.mark.not_fast

OLD = Path(__file__).parents[3] / "golden" / "quality_v1.duckdb.gz"


@pytest.fixture
def old(tmp_path: Path) -> QualityStore:
    path = tmp_path / "quality.duckdb"
    path.write_bytes(gzip.decompress(OLD.read_bytes()))
    return QualityStore(path)


def test_a_reader_of_an_old_file_gets_the_new_tables_with_the_old_rows(old: QualityStore) -> None:
    assert old.query("SELECT count(*) AS n FROM samples") == [{"n": 14}]
    assert old.query("SELECT count(*) AS n, count(is_grayscale) AS g FROM image_quality") == [{"n": 12, "g": 0}]
    # the empty caption and thirteen others, no two alike
    assert old.query("SELECT count(*) AS n FROM caption_quality WHERE length(caption_sha256) = 64") == [{"n": 14}]
    assert old.query("SELECT count(*) AS n, count(source_location) AS l FROM sample_versions") == [{"n": 14, "l": 0}]
    assert old.query("SELECT max(version) AS version FROM schema_version") == [{"version": SCHEMA_VERSION}]
    assert old.query("SELECT value FROM eval_metrics") == [{"value": 0.5}]
    assert old.query("SELECT answer FROM predictions") == [{"answer": "a"}]
    assert old.query("SELECT split, count(*) AS n FROM split_membership GROUP BY split ORDER BY split") == [
        {"split": "rejected", "n": 2},
        {"split": "train", "n": 8},
        {"split": "unused", "n": 2},
        {"split": "val", "n": 2},
    ]


def test_every_view_answers_on_an_old_file(old: QualityStore) -> None:
    reasons = old.query("SELECT reason FROM rejects WHERE dataset = 'made' ORDER BY rank")
    assert [row["reason"] for row in reasons] == ["image_truncated", "caption_empty"]
    kinds = [row["kind"] for row in old.query("SELECT kind FROM duplicates ORDER BY rank")]
    assert kinds == ["exact", "near"]
    for view in ASKED:
        old.query(f"SELECT dataset, rank FROM {view}")


def test_a_migrated_file_has_the_columns_of_a_new_one(old: QualityStore, tmp_path: Path) -> None:
    columns = (
        "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE schema_name = 'main' AND NOT internal "
        "ORDER BY ALL"
    )
    assert old.query(columns) == QualityStore(tmp_path / "new.duckdb").query(columns)


def test_what_was_called_a_missing_image_but_is_an_empty_one_is_called_so(old: QualityStore) -> None:
    with duckdb.connect(str(old.path)) as connection:
        connection.execute(
            "INSERT INTO image_quality BY NAME SELECT * REPLACE ('e3b0' AS image_sha256, 0 AS num_bytes, "
            "'image_missing' AS defect) FROM image_quality LIMIT 1"
        )
    assert old.query("SELECT defect FROM image_quality WHERE num_bytes = 0") == [{"defect": "image_empty"}]


def test_a_step_that_fails_leaves_the_old_file_as_it_was(old: QualityStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store.STEPS, 2, [*store.STEPS[2], "SELECT no_such_column FROM samples"])
    with pytest.raises(duckdb.Error, match="no_such_column"):
        old.query("SELECT 1")
    with duckdb.connect(str(old.path), read_only=True) as connection:
        assert connection.execute("SELECT max(version) FROM schema_version").fetchall() == [(1,)]
        assert connection.execute("SELECT count(*) FROM rejects").fetchall() == [(4,)]


def test_there_is_a_step_to_every_version_and_a_type_for_every_column() -> None:
    assert sorted(store.STEPS) == list(range(2, SCHEMA_VERSION + 1))
    assert {kind for table in TABLES.values() for kind in table.columns.values()} <= ARROW_TYPES.keys()
    assert set(ASKED) <= VIEWS.keys()
    assert not VIEWS.keys() & TABLES.keys()
