"""What a dataset's entries say of their images: read, or taken from the record of their publication."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mllm_assets import file_digests
from mllm_assets.artifacts import sha256_file
from mllm_assets.data.sharegpt import dataset
from mllm_assets.data.sharegpt.dataset import IMAGE_LIST, Dataset
from mllm_assets.data.sharegpt.entries import EntryInfo
from mllm_assets.data.sharegpt.parsing import unparsed_rows
from mllm_assets.errors import DataError, IntegrityError
from mllm_assets.file_digests import FileDigests
from mllm_assets.layout import Layout
from mllm_assets.worker.tasks import Part
from tests.unit.data.made_datasets import made_spec, png, run_line, write_source

pytestmark = pytest.mark.not_fast


@pytest.fixture
def made(layout: Layout) -> Layout:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    run_line(made_spec(8, 4), layout)
    return layout


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The images that were read to be hashed."""
    paths: list[Path] = []
    of = FileDigests.of

    def noted(self: FileDigests, path: Path) -> str:
        if path.suffix == ".png":
            paths.append(path)
        return of(self, path)

    monkeypatch.setattr(FileDigests, "of", noted)
    return paths


def test_a_planner_names_an_entry_by_its_record_and_reads_no_image(made: Layout, read: list[Path]) -> None:
    planned = Dataset(made.data, read_part=None).entry("made_train").digest
    assert read == []
    assert planned == Dataset(made.data).entry("made_train").digest, "the same name as by what is on the disk"
    assert len(read) == 8


def test_the_processes_of_a_run_share_the_images_between_them(made: Layout, read: list[Path]) -> None:
    for index in range(3):
        Dataset(made.data, read_part=Part(index=index, count=3)).entry("made_train").require_unchanged()
    assert sorted(read) == list(Dataset(made.data, read_part=None).entry("made_train").images)


def test_a_file_that_something_touched_is_read_again_whatever_its_size_and_time(tmp_path: Path) -> None:
    path, digests = tmp_path / "a.png", FileDigests()
    path.write_bytes(b"one")
    before, first = path.stat(), digests.of(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests.of(path) != first == digests.take(path, first)


def test_a_damaged_record_is_refused(made: Layout) -> None:
    """A planner would name a run by digests that nothing ever had."""
    record = (made.data / "made" / IMAGE_LIST).resolve()
    text = record.read_text()
    record.write_text(("0" if text[0] != "0" else "1") + text[1:])
    with pytest.raises(IntegrityError, match=r"images.sha256 does not match its digest. Materialise made/train again"):
        Dataset(made.data, read_part=None).entry("made_train").require_unchanged()


def test_the_steps_of_a_process_hash_each_file_of_a_version_once_until_something_touches_it(
    made: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of a line hashed the splits, and the record of their images, anew."""
    hashed, sha256 = Counter[str](), sha256_file
    monkeypatch.setattr(file_digests, "sha256_file", lambda path: hashed.update([path.name]) or sha256(path))

    def named() -> list[str]:
        data = Dataset(made.data, read_part=None)
        return [data.entry(name).digest for name in ("made_train", "made_val")]

    assert named() == named() == named()
    assert max(hashed[name] for name in ("train.json", "val.json", IMAGE_LIST)) <= 1
    split = (made.data / "made" / "train.json").resolve()
    other = split.with_name("other")
    other.write_text(split.read_text().replace("picture", "pikture"))
    other.replace(split)
    with pytest.raises(IntegrityError, match=r"train.json does not match its digest"):
        named()


def test_rows_are_read_once_for_all_who_ask_for_an_entrys_digest(made: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a million rows was parsed by the planner, by the trainer, and by each of its processes."""
    parsed: list[str] = []

    def noted(data_dir: Path, entry: EntryInfo, *args: Any) -> Iterator[Any]:
        parsed.append(entry.name)
        return unparsed_rows(data_dir, entry, *args)

    monkeypatch.setattr(dataset, "unparsed_rows", noted)

    def found(name: str = "made_train") -> tuple[str, int]:
        entry = Dataset(made.data, rows_root=made.rows).entry(name)
        return entry.digest, entry.num_rows

    expected = Dataset(made.data).entry("made_train")
    assert (expected.digest, expected.num_rows) == found() == found() and parsed == ["made_train"] * 2
    [kept] = made.rows.glob("*/images.json")
    kept.write_text(kept.read_text().replace("images/", "other/"))
    assert found() == (expected.digest, expected.num_rows) and len(parsed) == 3, "damaged: read again"
    image = next(iter(expected.images))
    image.rename(image.with_suffix(".gone"))
    with pytest.raises(DataError, match=f"there is no image .*{image.name}"):
        found()


def test_a_row_that_is_passed_over_is_not_parsed(made: Layout) -> None:
    """Of two processes that encode a file each goes through all of it."""
    entry = Dataset(made.data).entry("made_train")
    waiting, rows = list(entry.unparsed()), entry.rows
    rows[0].images[0].unlink()
    assert [row() for row in waiting[1:]] == rows[1:]
    with pytest.raises(DataError, match="there is no image"):
        waiting[0]()


def test_of_rows_that_name_links_nothing_is_kept(made: Layout) -> None:
    """The same file of rows may mean another picture next time."""
    image = next(iter(Dataset(made.data).entry("made_train").images))
    moved = image.rename(image.with_suffix(".jpg"))
    image.symlink_to(moved)
    assert Dataset(made.data, rows_root=made.rows).entry("made_train").num_rows == 8
    assert not list(made.rows.glob("*/images.json"))


def test_an_image_behind_a_link_inside_the_folder_is_read_and_one_outside_refused(made: Layout) -> None:
    """Folders are resolved once; a link is still followed for each row."""
    entry = Dataset(made.data).entry("made_train")
    image = entry.rows[0].images[0]
    moved = made.data / "elsewhere.png"
    image.rename(moved)
    image.symlink_to(moved)
    assert Dataset(made.data).entry("made_train").rows[0].images == (moved.resolve(),)
    moved.rename(made.root / "outside.png")
    image.unlink()
    image.symlink_to(made.root / "outside.png")
    with pytest.raises(DataError, match="leaves"):
        Dataset(made.data).entry("made_train").read()
