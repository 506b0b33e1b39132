"""Several processes write at once, and one dies in the middle: no lost row, no lock error, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest

from mllm_assets.artifacts import find_damage
from mllm_assets.data.checks import every_image_has_a_placeholder
from mllm_assets.layout import Layout
from mllm_assets.quality.store import QualityStore

pytestmark = pytest.mark.integration

WRITER = """
import sys
from pathlib import Path
from mllm_assets.quality.store import QualityStore, table_for
path, writer = sys.argv[1:]
store = QualityStore(Path(path))
for number in range(5):
    row = {"run_id": f"{writer} {number}", "asset": "emoji/raw", "digest": "d", "metadata": "{}"}
    store.write({"runs": table_for("runs", [row])})
    assert store.query("SELECT count(*) AS n FROM runs WHERE run_id = ?", [row["run_id"]]) == [{"n": 1}]
"""
LINE = """
import sys
from pathlib import Path
from mllm_assets.data.dataset_info import register
from mllm_assets.data.sources import ingest
from mllm_assets.data.spec import DatasetSpec, SourceSpec, SplitSpec
from mllm_assets.data.splits import split
from mllm_assets.layout import Layout
from mllm_assets.quality.assess import assess
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
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_four_processes_write_and_read_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "quality.duckdb"
    for process in [start(WRITER, str(path), f"writer {number}") for number in range(4)]:
        finish(process)
    assert QualityStore(path).query("SELECT count(*) AS n FROM runs") == [{"n": 20}]


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


def test_a_reader_is_not_refused_while_others_write(tmp_path: Path) -> None:
    path = tmp_path / "quality.duckdb"
    writers = [start(WRITER, str(path), f"writer {number}") for number in range(2)]
    deadline = time.monotonic() + 60
    while any(writer.poll() is None for writer in writers) and time.monotonic() < deadline:
        QualityStore(path).query("SELECT count(*) AS n FROM runs")
    for writer in writers:
        finish(writer)
