"""Several processes write at once, and one dies in the middle: no lost row, no lock error, nothing half-written."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest

from mllm_assets.artifacts import find_damage
from mllm_assets.data.curate.checks import every_image_has_a_placeholder
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.layout import Layout

pytestmark = pytest.mark.integration

WRITER = """
import sys
from pathlib import Path
from mllm_assets.data.quality.store import QualityStore, table_for
path, writer = sys.argv[1:]
store = QualityStore(Path(path))
for number in range(5):
    row = {"run_id": f"{writer} {number}", "asset": "emoji/raw", "digest": "d", "metadata": "{}"}
    store.write({"runs": table_for("runs", [row])})
    assert store.query("SELECT count(*) AS n FROM runs WHERE run_id = ?", [row["run_id"]]) == [{"n": 1}]
"""
ENDLESS_WRITER = """
import itertools, sys
from pathlib import Path
from mllm_assets.data.quality.store import QualityStore, table_for
path, writer = sys.argv[1:]
store = QualityStore(Path(path))
for number in itertools.count():
    run = f"{writer} {number}"
    rows = [{"dataset": "d", "quality_digest": run, "sample_id": str(n), "run_id": run} for n in range(1000)]
    run_rows = [{"run_id": run, "asset": "d/sample_quality"}]
    store.write({"verdicts": table_for("verdicts", rows), "runs": table_for("runs", run_rows)})
    print(run, flush=True)
"""
SHELL = """
import duckdb, sys
with duckdb.connect(sys.argv[1]):
    print("open", flush=True)
    sys.stdin.read()
"""
LINE = """
import sys
from pathlib import Path
from mllm_assets.data.curate.register import register
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.ingest.split_spec import SplitSpec
from mllm_assets.data.curate.splits import split
from mllm_assets.layout import Layout
from mllm_assets.data.quality.assess import assess
root, name = sys.argv[1:]
layout = Layout(Path(root))
source = SourceSpec(kind="parquet", path="package:emoji.parquet", label_column="group")
spec = DatasetSpec(
    name=name, source=source, prompts=("What?",), answer="{label}", split=SplitSpec(num_train=680, num_val=120)
)
raw = ingest(spec, layout)
quality = assess(spec, layout, raw.directory, name)
version = split(spec, layout, raw.directory, quality.directory, name)
register(spec, layout, version.directory)
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors


def test_eight_processes_write_and_read_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "quality.duckdb"
    for process in [start(WRITER, str(path), f"writer {number}") for number in range(8)]:
        finish(process)
    assert QualityStore(path).query("SELECT count(*) AS n FROM runs") == [{"n": 40}]


@pytest.mark.attack("kill -9")
def test_kill_9_in_a_write_loses_no_acknowledged_row_and_tears_no_batch(tmp_path: Path) -> None:
    """Each batch goes into two tables; a writer says a batch's number once `write` has returned."""
    path = tmp_path / "quality.duckdb"
    acknowledged: set[str] = set()
    rng = random.Random(4)
    for writer in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS_WRITER, str(path), str(writer)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        acknowledged.add(process.stdout.readline().strip())
        time.sleep(rng.uniform(0.0, 0.6))
        process.kill()
        acknowledged |= {line.strip() for line in process.stdout if line.endswith("\n")}
        process.wait()
    store = QualityStore(path)
    written = store.query("SELECT run_id, count(*) AS n FROM verdicts GROUP BY run_id")
    assert acknowledged <= {row["run_id"] for row in written}
    assert {row["n"] for row in written} == {1000}
    runs = store.query("SELECT run_id FROM runs")
    assert {row["run_id"] for row in runs} == {row["run_id"] for row in written}
    assert len(acknowledged) >= 6


def test_a_reader_is_served_from_the_copy_while_another_program_has_the_file(tmp_path: Path) -> None:
    path = tmp_path / "quality.duckdb"
    finish(start(WRITER, str(path), "first"))
    shell = subprocess.Popen([sys.executable, "-c", SHELL, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert shell.stdout is not None
    assert shell.stdout.readline() == b"open\n"
    started_s = time.monotonic()
    assert QualityStore(path, patience_s=0.5).query("SELECT count(*) AS n FROM runs") == [{"n": 5}]
    assert time.monotonic() - started_s < 60
    shell.communicate()


def test_a_program_that_holds_the_file_is_waited_for(tmp_path: Path) -> None:
    """Someone's open `duckdb` shell does not take our file lock; DuckDB refuses us until it is closed."""
    path = tmp_path / "quality.duckdb"
    QualityStore(path).query("SELECT 1")
    with duckdb.connect(str(path)):
        writer = start(WRITER, str(path), "waiting")
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(2)
    finish(writer)
    assert QualityStore(path).query("SELECT count(*) AS n FROM runs") == [{"n": 5}]


def test_two_datasets_are_built_at_once_in_one_root(layout: Layout) -> None:
    for process in [start(LINE, str(layout.root), name) for name in ("left", "right")]:
        finish(process)
    store = QualityStore(layout.quality_db)
    rows = store.query("SELECT dataset, split, count(*) AS n FROM split_membership GROUP BY ALL ORDER BY ALL")
    assert [tuple(row.values()) for row in rows] == [
        ("left", "train", 680),
        ("left", "val", 120),
        ("right", "train", 680),
        ("right", "val", 120),
    ]
    assert set(json.loads(layout.dataset_info.read_text())) == {"left_train", "left_val", "right_train", "right_val"}
    for name in ("left", "right"):
        assert every_image_has_a_placeholder((layout.data / name).resolve(), layout.data).passed


@pytest.mark.attack("kill -9")
@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_the_version_is_whole(tmp_path: Path) -> None:
    digests = set()
    for number, after_s in enumerate((0.6, 0.9, 1.2, 1.6)):
        layout = Layout(tmp_path / str(number))
        layout.root.mkdir()
        process = start(LINE, str(layout.root), "emoji")
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        for manifest in layout.root.glob("data/.*/emoji/[!.]*/manifest.json"):
            assert find_damage(manifest.parent) is None
        finish(start(LINE, str(layout.root), "emoji"))
        version = (layout.data / "emoji").resolve()
        digests.add(version.name)
        assert find_damage(version) is None
        assert every_image_has_a_placeholder(version, layout.data).passed
    assert len(digests) == 1


@pytest.mark.slow
def test_a_reader_is_not_refused_while_others_write(tmp_path: Path) -> None:
    path = tmp_path / "quality.duckdb"
    writers = [start(WRITER, str(path), f"writer {number}") for number in range(2)]
    deadline = time.monotonic() + 60
    while any(writer.poll() is None for writer in writers) and time.monotonic() < deadline:
        QualityStore(path).query("SELECT count(*) AS n FROM runs")
    for writer in writers:
        finish(writer)
