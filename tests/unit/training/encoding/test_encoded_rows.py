"""Encoded rows in Arrow: what is read is what was encoded, and their files survive interruption, damage and company."""

import os
import pickle
import resource
import shutil
import signal
import sys
from array import array
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from mllm_assets.errors import DataError, IntegrityError, MachineError
from mllm_assets.file_digests import FileDigests
from mllm_assets.layout import Layout
from mllm_assets.operations.gc import Policy, find_garbage
from mllm_assets.operations.repair import find_damages
from mllm_assets.training.encoding import row_files
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.encoding.row_files import ROWS_FILE, Source, stored_rows
from mllm_assets.worker.protocol import Reporter
from tests.damage import DAMAGES, OTHER_KINDS

IMAGE, NOT = 9, -100
PART_ROWS = 4


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "PART_ROWS", PART_ROWS)


def row(row_id: str, input_ids: Iterable[int], labels: Iterable[int], **facts: object) -> EncodedRow:
    return EncodedRow(id=row_id, input_ids=array("i", input_ids), labels=array("i", labels), **facts)  # pyright: ignore


def different_rows(folder: Path) -> list[EncodedRow]:
    a, b = folder / "images" / "a.png", folder.parent / "elsewhere" / "b.png"
    return [
        row("begins with a picture", [IMAGE] * 5 + [1, 2], [NOT] * 6 + [2], images=(a,)),
        row("ends with a picture", [1, 2] + [IMAGE] * 3, [NOT, 2, NOT, NOT, NOT], images=(b,)),
        row("is a picture", [IMAGE] * 4, [IMAGE] * 4, images=(a,)),
        row("learns\udcff twice", [1, 2, 3, 4, 5], [1, NOT, 3, 4, NOT], num_tokens_cut=7),
        row("two pictures", [IMAGE, IMAGE, 1, IMAGE, 2], [NOT] * 4 + [2], images=(b, a), num_patches=20, num_crops=3,
            grids_thw=((1, 2, 4), (1, 4, 3))),
        row("learns all", [1, 2], [1, 2]),
        row("one token", [3], [3]),
        *(row(str(n), [n, n + 1], [NOT, n + 1]) for n in range(5)),
    ]  # fmt: skip


def source_of(rows: list[EncodedRow], folder: Path, **changed: object) -> Source[EncodedRow]:
    known = {
        "count": len(rows),
        "rows": lambda: iter(rows),
        "encode": lambda row: row,
        "require_unchanged": lambda: None,
        "folder": folder,
        "image_token_id": IMAGE,
    }
    return Source(**{**known, **changed})


def stored(directory: Path, source: Source[EncodedRow], reporter: Reporter | None = None) -> EncodedRows:
    return stored_rows(directory, source, FileDigests(), reporter or Reporter())


@pytest.fixture
def rows(tmp_path: Path) -> list[EncodedRow]:
    return different_rows(tmp_path / "data")


def test_a_row_is_read_as_it_was_encoded_from_files_and_from_memory(tmp_path: Path, rows: list[EncodedRow]) -> None:
    folder = tmp_path / "data"
    for found in (stored(tmp_path / "rows", source_of(rows, folder)), EncodedRows.of(rows, IMAGE, folder)):
        assert list(found) == rows and found[-2] == rows[-2]
        assert list(found[2:5]) == rows[2:5]
        twice = found.take([5, 0, 5])
        assert list(twice + found) == [rows[5], rows[0], rows[5], *rows]
        assert found.counted("num_tokens").tolist() == [len(row.input_ids) for row in rows]
        assert found.counted("num_image_tokens").tolist() == [row.input_ids.count(IMAGE) for row in rows]
        assert found.counted("num_supervised").tolist() == [row.num_supervised for row in rows]
        assert found.counted("images").tolist() == [len(row.images) for row in rows]
        named = {path: next(row.id for row in rows if path in row.images) for row in rows for path in row.images}
        assert dict(found.pictures()) == named
        assert dict(found.take([4]).pictures()) == dict.fromkeys(rows[4].images, rows[4].id)
        different = {bytes(row.input_ids): len(row.input_ids) for row in rows}
        assert (twice + found).num_different_tokens == sum(different.values()) < found.counted("num_tokens").sum()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_pictures_of_mapped_rows_are_known_without_a_page_of_them(tmp_path: Path, rows: list[EncodedRow]) -> None:
    """Predictions ask for those of another row, at random: all pages of a million rows came into memory."""
    stored = stored_rows(tmp_path / "rows", source_of(rows, tmp_path), FileDigests(), Reporter())
    pictures = stored.numbered_pictures()
    assert [pictures.of(place) for place in range(len(rows))] == [row.images for row in rows]
    assert mapped_pages(tmp_path / "rows") == 0, "nor of where they begin"
    assert list(stored) == rows
    assert mapped_pages(tmp_path / "rows") > 0
    last_first = stored.take(range(len(rows) - 1, -1, -1))
    assert last_first.numbered_pictures().of(0) == rows[-1].images


def mapped_pages(folder: Path) -> int:
    """KiB of files below a folder that are in this process's memory."""
    found, is_below = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_below = str(folder) in line
        elif is_below and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


def test_packed_rows_are_put_together_when_they_are_asked_for(tmp_path: Path, rows: list[EncodedRow]) -> None:
    packed = EncodedRows.of(rows, IMAGE, tmp_path / "data").packed([[3, 5], [0]])
    assert len(packed) == 2 and packed.counted("num_tokens").tolist() == [7, 7]
    assert list(packed[0].input_ids) == [1, 2, 3, 4, 5, 1, 2] and packed[0].id == "learns\udcff twice, learns all"
    assert list(packed[0].positions) == [0, 1, 2, 3, 4, 0, 1] and packed[1].images == rows[0].images
    assert [row.id for row in packed[::-1] + packed] == [packed[k].id for k in (1, 0, 0, 1)]


def test_a_pair_is_stored_as_two_rows_and_read_as_one(tmp_path: Path, rows: list[EncodedRow]) -> None:
    pairs = [replace(rows[n], other=rows[n + 1]) for n in range(0, 10, 2)]
    found = stored(tmp_path / "rows", source_of(pairs, tmp_path / "data", in_pairs=True))
    assert list(found) == pairs and list(found.sequences) == rows[:10]
    found.reference = np.array([[-n, -n - 0.5] for n in range(5)])
    mixed = found.take([3, 0]) + found
    assert [row.id for row in mixed] == [pairs[n].id for n in (3, 0, 0, 1, 2, 3, 4)]
    assert mixed.counted("num_tokens").tolist() == [len(row.input_ids) for row in mixed], "of preferred answers"
    assert found.take([3, 0])[0] == replace(pairs[3], reference=(-3.0, -3.5)), "of the row, wherever it is"


def test_a_loader_process_maps_the_files_and_is_sent_no_row(tmp_path: Path) -> None:
    many = [row(str(n), range(1000, 2000), [NOT] * 999 + [1999]) for n in range(20)]
    found = stored(tmp_path / "rows", source_of(many, tmp_path))
    sent = pickle.dumps(found)
    assert len(sent) < 4000 and list(pickle.loads(sent)) == many


def test_rows_are_encoded_once_and_on_from_where_it_was_interrupted(tmp_path: Path, rows: list[EncodedRow]) -> None:
    done: list[str] = []

    def encode(row: EncodedRow) -> EncodedRow:
        if row is rows[6] and len(done) < 7:
            raise KeyboardInterrupt
        done.append(row.id)
        return row

    source = source_of(rows, tmp_path / "data", encode=encode)
    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path / "rows", source)
    del done[PART_ROWS:]
    done += [""] * PART_ROWS  # so that it is not interrupted again
    for _ in range(2):
        assert list(stored(tmp_path / "rows", source)) == rows
    assert done[2 * PART_ROWS :] == [row.id for row in rows[PART_ROWS:]]


@pytest.mark.parametrize("damage", [*DAMAGES, *OTHER_KINDS])
@pytest.mark.parametrize("file", [ROWS_FILE, "manifest.json"])
def test_damaged_rows_are_named_by_doctor_and_encoded_again(
    damage: str, file: str, tmp_path: Path, rows: list[EncodedRow]
) -> None:
    layout, name = Layout(tmp_path), "0123456789abcdef"
    source = source_of(rows, tmp_path / "data")
    stored(layout.rows / name, source)
    part = layout.rows / name / "00001"
    (DAMAGES | OTHER_KINDS)[damage](part / file)
    assert [(found.kind, found.path) for found in find_damages(layout)] == [("encoded rows", part)]
    encoded: list[str] = []
    source = source_of(rows, tmp_path / "data", encode=lambda row: encoded.append(row.id) or row)
    assert list(stored(layout.rows / name, source)) == rows
    assert encoded == [row.id for row in rows[PART_ROWS : 2 * PART_ROWS]]
    assert not list(find_damages(layout))


def test_damage_of_a_finished_part_is_said(tmp_path: Path, rows: list[EncodedRow]) -> None:
    reporter, source = Reporter(), source_of(rows, tmp_path / "data")
    stored(tmp_path / "rows", source, reporter)
    assert reporter.warnings == []
    DAMAGES["flipped"](tmp_path / "rows" / "00002" / ROWS_FILE)
    stored(tmp_path / "rows", source, reporter)
    assert len(reporter.warnings) == 1 and "00002 were damaged or others, and are encoded again" in reporter.warnings[0]


def test_a_part_that_was_copied_from_elsewhere_is_not_believed(tmp_path: Path, rows: list[EncodedRow]) -> None:
    """Its file has the digest that its manifest says."""
    source = source_of(rows, tmp_path / "data")
    stored(tmp_path / "rows", source)
    shutil.rmtree(tmp_path / "rows" / "00000")
    shutil.copytree(tmp_path / "rows" / "00001", tmp_path / "rows" / "00000")
    reporter = Reporter()
    assert list(stored(tmp_path / "rows", source, reporter)) == rows
    assert len(reporter.warnings) == 1 and "00000 were damaged or others" in reporter.warnings[0]


def test_a_full_disk_is_said_and_what_was_finished_stays(tmp_path: Path, rows: list[EncodedRow]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def encode(row: EncodedRow) -> EncodedRow:
        if row is rows[PART_ROWS]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        return row

    try:
        with pytest.raises(MachineError, match=r"The disk is full: .* Nothing half-written is kept"):
            stored(tmp_path / "rows", source_of(rows, tmp_path / "data", encode=encode))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == ["00000"]


def test_two_that_encode_at_once_do_not_disturb_each_other(tmp_path: Path, rows: list[EncodedRow]) -> None:
    """The other one finishes all parts while this one is in the middle of its first."""
    others: list[EncodedRows] = []

    def encode(row: EncodedRow) -> EncodedRow:
        if row is rows[1] and not others:
            others.append(stored(tmp_path / "rows", source_of(rows, tmp_path / "data")))
        return row

    own = stored(tmp_path / "rows", source_of(rows, tmp_path / "data", encode=encode))
    assert list(own) == list(others[0]) == rows


def test_rows_of_a_file_that_changes_meanwhile_are_not_kept(tmp_path: Path, rows: list[EncodedRow]) -> None:
    def changed() -> None:
        raise IntegrityError("it changed")

    with pytest.raises(IntegrityError):
        stored(tmp_path / "rows", source_of(rows, tmp_path / "data", require_unchanged=changed))
    assert not list((tmp_path / "rows").glob("[!.]*"))


def test_gc_deletes_rows_that_were_not_used_for_long(tmp_path: Path, rows: list[EncodedRow]) -> None:
    layout = Layout(tmp_path)
    for name in ("0123456789abcdef", "fedcba9876543210"):
        stored(layout.rows / name, source_of(rows, tmp_path / "data"))
    found = find_garbage(layout, Policy(older_than_s=0)).garbage
    assert {(item.kind, item.path.name) for item in found} == {
        ("encoded rows", "0123456789abcdef"), ("encoded rows", "fedcba9876543210")
    }  # fmt: skip
    assert not find_garbage(layout, Policy()).garbage


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three, one for each part."""
    monkeypatch.setattr(row_files, "NUM_QUIET", 0)
    monkeypatch.setattr(row_files, "_num_cores", lambda: 3)


@pytest.mark.usefixtures("processes")
def test_processes_share_the_parts_and_each_row_is_encoded_once(tmp_path: Path, rows: list[EncodedRow]) -> None:
    def encode(row: EncodedRow) -> EncodedRow:
        with (tmp_path / "log").open("ab") as log:
            log.write(f"{os.getpid()} {rows.index(row)}\n".encode())
        return row

    assert list(stored(tmp_path / "rows", source_of(rows, tmp_path / "data", encode=encode))) == rows
    noted = [tuple(map(int, line.split())) for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(number for _, number in noted) == [*range(len(rows))]
    assert len({pid for pid, _ in noted}) == 3
    assert not active_children()


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: sys.exit(3)], ids=["-9", "exit"])
def test_what_a_process_leaves_when_it_dies_is_encoded_by_who_waits(
    tmp_path: Path, rows: list[EncodedRow], end: Callable[[], None]
) -> None:
    own = os.getpid()

    def encode(row: EncodedRow) -> EncodedRow:
        if os.getpid() != own and row is rows[PART_ROWS + 1]:
            end()
        return row

    assert list(stored(tmp_path / "rows", source_of(rows, tmp_path / "data", encode=encode))) == rows
    assert not list((tmp_path / "rows").glob(".*"))


@pytest.mark.usefixtures("processes")
def test_a_wrong_row_of_another_process_is_named(tmp_path: Path, rows: list[EncodedRow]) -> None:
    def encode(row: EncodedRow) -> EncodedRow:
        if row is rows[-1]:
            raise DataError("row 10 is wrong")
        return row

    with pytest.raises(DataError, match="row 10 is wrong"):
        stored(tmp_path / "rows", source_of(rows, tmp_path / "data", encode=encode))
    assert not active_children()
