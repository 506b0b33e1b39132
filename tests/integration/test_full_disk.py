"""A disk that is really full, a small tmpfs: what is said, what is kept, and that the same call works with room."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mllm_assets.artifacts import is_complete
from mllm_assets.data.curate.splits import split
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.quality.assess import assess
from mllm_assets.data.quality.store import QualityStore, table_for, utc_now
from mllm_assets.disk import free_on
from mllm_assets.errors import MachineError
from mllm_assets.layout import Layout
from mllm_assets.operations.gc import Policy, find_garbage
from tests.unit.data.made_datasets import made_spec, png, write_source

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.attack("full disk"), pytest.mark.timeout(1200)]
KIB = 1024
NUM_ROWS = 48


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 24 MiB large."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, *, left: int) -> Path:
    """Leave so many bytes free."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_on(disk) - left)
    return filler


def spec_of(tmp_path: Path) -> DatasetSpec:
    # pictures that hardly compress, so that raw and published images take more than what is left
    name = write_source(tmp_path, [(png(n, 64) + os.urandom(24 * KIB), f"picture {n}") for n in range(NUM_ROWS)])
    return made_spec(32, 8, source=SourceSpec(kind="parquet", path=str(tmp_path / name)))


STAGES: dict[str, Callable[[DatasetSpec, Layout], object]] = {
    "raw": ingest,
    "sample_quality": lambda spec, layout: assess(spec, layout, ingest(spec, layout).directory, "run"),
    "splits": lambda spec, layout: split(
        spec,
        layout,
        ingest(spec, layout).directory,
        assess(spec, layout, ingest(spec, layout).directory, "run").directory,
        "run",
    ),
}


def published(layout: Layout) -> set[str]:
    found = (path.parent for path in layout.data.glob(".*/*/*/manifest.json"))
    return {path.relative_to(layout.data).as_posix() for path in found}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("left_kib", [0, 64, 400])
def test_an_asset_of_a_dataset_says_what_it_needs_and_what_can_go(
    disk: Path, tmp_path: Path, stage: str, left_kib: int
) -> None:
    """It was the traceback of pyarrow, DuckDB or pathlib, or the advice to delete an undamaged source."""
    spec, layout = spec_of(tmp_path), Layout(disk)
    before = list(STAGES)[: list(STAGES).index(stage)]
    raw = ingest(spec, layout) if before else None
    quality = assess(spec, layout, raw.directory, "run") if raw and stage == "splits" else None
    kept = published(layout)
    filler = fill(disk, left=left_kib * KIB)

    def make() -> Path:
        if raw is None:
            return ingest(spec, layout).directory
        if quality is None:
            return assess(spec, layout, raw.directory, "run").directory
        return split(spec, layout, raw.directory, quality.directory, "run").directory

    with pytest.raises(MachineError) as caught:
        make()
    said = str(caught.value)
    assert said.startswith(f"The disk is full: what is written to {layout.data}")
    assert (
        " needs more than the " in said and " that were free" in said and "`mllm-assets gc` lists what can go" in said
    )
    assert not [path for path in layout.data.rglob(".*") if path.name.endswith((".tmp", ".lock"))]
    if published(layout) != kept:  # its folder was complete; the database came after it
        assert f"Nothing was added to {layout.quality_db.name}" in said or "The rows are in" in said
    filler.unlink()
    assert is_complete(make())


def rows(run_id: str, num_bytes: int):
    row = {"run_id": run_id, "asset": "a", "digest": os.urandom(num_bytes // 2).hex(), "created_at": utc_now()}
    return {"runs": table_for("runs", [row | {"metadata": "{}"}])}


def test_a_failed_write_says_truly_whether_its_rows_are_in_the_database(disk: Path) -> None:
    """Each place where it can fail: the rows, their commit, the checkpoint, and the copy for readers after it."""
    store = QualityStore(disk / "quality.duckdb")
    store.write(rows("first", 10))
    said: dict[int, str] = {}
    for left_kib in (0, 16, 300, 700, 1000, 1300, 1600, 2000, 2600, 3200, 4000, 5000, 6500, 8000):
        filler = fill(disk, left=left_kib * KIB)
        run_id = f"run-{left_kib}"
        try:
            store.write(rows(run_id, 600 * KIB))
        except MachineError as error:
            said[left_kib] = str(error)
        filler.unlink()
        is_in = store.query("SELECT count(*) AS n FROM runs WHERE run_id = ?", [run_id])[0]["n"] == 1
        claim = said.get(left_kib, "The rows are in")
        assert ("The rows are in" in claim) == is_in, (left_kib, claim)
        assert ("Nothing was added" in claim) == (not is_in), (left_kib, claim)
        store.write(rows(run_id, 10))  # the same call works with more room
    assert any("Nothing was added" in text for text in said.values()), said
    assert any("The rows are in quality.duckdb, but not yet in" in text for text in said.values()), said
    assert not list(disk.glob(".quality.duckdb.*.tmp"))


def test_a_copy_that_cannot_be_written_says_that_the_rows_are_in(tmp_path: Path) -> None:
    store = QualityStore(tmp_path / "quality.duckdb")
    store.snapshot.mkdir(parents=True)  # nothing can be renamed to it
    with pytest.raises(MachineError, match=r"\.snapshot, .* cannot be written .* The rows are in quality\.duckdb"):
        store.write(rows("one", 10))
    assert store.query("SELECT run_id FROM runs") == [{"run_id": "one"}]


def test_what_a_killed_write_of_the_database_leaves_is_known_to_gc_and_swept_by_the_next(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    store = QualityStore(layout.quality_db)
    store.write(rows("one", 10))
    copy = layout.quality_db.with_name(".quality.duckdb.0123abcd.tmp")
    spilled = layout.quality_db.with_name("quality.duckdb.tmp")
    copy.write_bytes(b"half")
    spilled.mkdir()
    (spilled / "duckdb_temp_storage-0.tmp").write_bytes(b"x")
    found = {item.path for item in find_garbage(layout, Policy(older_than_s=0)).garbage}
    assert {copy, spilled} <= found and layout.quality_db not in found and store.snapshot not in found
    store.write(rows("two", 10))
    assert not copy.exists()
