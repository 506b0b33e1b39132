"""The Hub source against a stand-in Hub, through the real client: which rows are read."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm_assets.data.ingest.hub import read_hub
from mllm_assets.data.ingest.hub_files import BUFFER_BYTES, split_files
from mllm_assets.errors import DataError
from tests.integration.hub_datasets import FILES, FILES_READ, failing, hub_spec, ingested, parquet_file, png
from tests.integration.stand_in_hub import Repo, StandInHub, commit_of

pytestmark = pytest.mark.integration


@pytest.fixture
def hub(empty_hub: StandInHub) -> StandInHub:
    """The Hub with one dataset."""
    empty_hub.repos = {"datasets/made/set": Repo.of(FILES)}
    return empty_hub


def test_a_sample_of_rows_is_read_at_a_commit_that_is_recorded(hub: StandInHub, tmp_path: Path) -> None:
    raw, rows = ingested(hub, tmp_path / "a")
    numbers = [row["row_index"] for row in rows]
    assert raw.revision == hub.repos["datasets/made/set"].head
    assert json.loads((raw.directory / "manifest.json").read_text())["revision"] == raw.revision
    assert len(rows) == 30  # a fifth more than the 25 that the splits ask for
    assert numbers == sorted(set(numbers)) and numbers[0] < 100 < numbers[-1]
    assert [row["caption"] for row in rows] == [f"picture {number}" for number in numbers]
    assert [row["label"] for row in rows] == ["odd" if number % 2 else "even" for number in numbers]
    assert [row["images"] for row in rows] == [[png(number)] for number in numbers]
    assert ingested(hub, tmp_path / "b")[0].digest == raw.digest


def test_a_branch_that_moves_gives_another_commit_and_a_pinned_one_stays(hub: StandInHub, tmp_path: Path) -> None:
    repo = hub.repos["datasets/made/set"]
    first = repo.head
    before, _ = ingested(hub, tmp_path, hub_spec(revision="main"))
    repo.commits[commit_of("second")] = {"data/train.parquet": parquet_file(900, 40)}
    repo.refs |= {"main": commit_of("second"), "v1.0": first}
    moved, rows = ingested(hub, tmp_path, hub_spec(revision="main"))
    assert (before.revision, moved.revision) == (first, commit_of("second"))
    assert {int(row["caption"].split()[1]) >= 900 for row in rows} == {True}
    for revision in (first, "v1.0"):
        pinned, _ = ingested(hub, tmp_path, hub_spec(revision=revision))
        assert (pinned.revision, pinned.digest) == (first, before.digest)
    assert hub.count("resolve/main") == 0  # a branch that moves while it is read would mix two versions


def test_a_commit_that_was_read_is_not_read_again(hub: StandInHub, tmp_path: Path) -> None:
    first, _ = ingested(hub, tmp_path)
    hub.forget()
    again, _ = ingested(hub, tmp_path)
    assert again == first
    assert hub.count(FILES_READ) == 0
    larger, rows = ingested(hub, tmp_path, hub_spec(40, 10))
    assert larger.digest != first.digest and len(rows) == 60
    hub.forget()
    ingested(hub, tmp_path, hub_spec(revision=first.revision))
    assert hub.requests == []


def test_of_many_files_only_a_sample_of_row_groups_is_read(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 32 files: 32 footers, and row groups until the rows suffice."""
    monkeypatch.setattr("mllm_assets.data.ingest.hub.SPREAD_BYTES", 0)
    files = {f"data/train-{n:05}-of-00050.parquet": parquet_file(n * 40, 40) for n in range(50)}
    hub.repos["datasets/made/set"] = Repo.of(files)
    _, rows = read_hub(hub_spec(), endpoint=hub.endpoint)
    texts = [row.caption for row in rows]
    assert len(set(texts)) == 30
    assert hub.count(FILES_READ) == 32 + 3  # three groups of ten rows
    assert hub.num_body_bytes < 0.6 * sum(map(len, files.values()))  # footers of 64 KiB, of files of 150 KiB


def test_files_of_few_rows_are_opened_until_the_rows_suffice(hub: StandInHub) -> None:
    """A sample from 32 files of one row would leave the splits short without a word."""
    files = {f"data/train-{n:05}-of-00050.parquet": parquet_file(n, 1) for n in range(50)}
    hub.repos["datasets/made/set"] = Repo.of(files)
    _, rows = read_hub(hub_spec(32, 8), endpoint=hub.endpoint)
    assert len(list(rows)) == 48


def test_chosen_rows_are_those_places_of_the_whole_split(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def choose(num_rows: int) -> list[int]:
        sizes.append(num_rows)
        return [150, 3, 99]

    _, rows = read_hub(hub_spec(), endpoint=hub.endpoint, choose=choose)
    assert [row.caption for row in rows] == ["picture 3", "picture 99", "picture 150"]
    assert sizes == [160]
    assert hub.count(FILES_READ) == 2 + 3


@pytest.mark.slow
def test_all_rows_come_in_the_order_that_datasets_gives(hub: StandInHub, tmp_path: Path) -> None:
    """`datasets.load_dataset(...)` is what the original guide shuffles."""
    script = (
        "import datasets, sys\n"
        "rows = datasets.load_dataset('made/set', split='train', streaming=True)\n"
        "print(*[row['text'] for row in rows.select_columns('text')], sep='|')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    _, rows = read_hub(hub_spec(), endpoint=hub.endpoint, choose=range)
    assert done.stdout.strip().split("|") == [row.caption for row in rows]


def test_a_row_group_of_many_megabytes_is_never_whole_in_memory(hub: StandInHub) -> None:
    file = parquet_file(0, 1000, group_rows=1000, num_bytes=32 * 1024)
    assert pq.ParquetFile(io.BytesIO(file)).num_row_groups == 1 and len(file) > 30 * 2**20
    hub.repos["datasets/made/set"] = Repo.of({"data/train.parquet": file})
    before = pa.total_allocated_bytes()
    _, rows = read_hub(hub_spec(800, 20), endpoint=hub.endpoint)
    peak = max(pa.total_allocated_bytes() - before for _ in rows)
    assert peak < 16 * 2**20
    asked = [re.fullmatch(r"bytes=(\d+)-(\d+)", request.range or "") for request in hub.requests]
    assert max(int(m[2]) - int(m[1]) + 1 for m in asked if m) <= BUFFER_BYTES


def test_another_split_is_read_whole_where_it_is_small(hub: StandInHub, tmp_path: Path) -> None:
    _, rows = ingested(hub, tmp_path, hub_spec(split="validation"))
    assert [row["caption"] for row in rows] == [f"picture {number}" for number in range(500, 510)]


CARD = {
    "configs": [
        {
            "config_name": "small",
            "data_files": [{"split": "train", "path": "s/*"}, {"split": "test", "path": "t.parquet"}],
        },
        {"config_name": "large", "data_files": "./deep/**"},
        {"config_name": "folder", "data_dir": "f/"},
    ]
}


@pytest.mark.parametrize(
    ("source", "captions"),
    [
        ({"subset": "small"}, ["picture 0", "picture 1"]),
        ({"subset": "small", "split": "test"}, ["picture 10"]),
        ({"subset": "large"}, ["picture 20"]),
        ({"subset": "folder"}, ["picture 30"]),
    ],
)
def test_the_dataset_card_says_which_files_are_of_a_subset(
    hub: StandInHub, tmp_path: Path, source: dict[str, str], captions: list[str]
) -> None:
    files = {"s/a.parquet": (0, 1), "s/b.parquet": (1, 1), "t.parquet": (10, 1), "deep/er/c.parquet": (20, 1)} | {
        "f/train/d.parquet": (30, 1),
        "f/test/e.parquet": (40, 1),
    }
    repo = Repo.of({name: parquet_file(*rows) for name, rows in files.items()}, card=CARD)
    hub.repos["datasets/made/set"] = repo
    _, rows = ingested(hub, tmp_path, hub_spec(**source))
    assert [row["caption"] for row in rows] == captions


def test_a_dataset_of_several_subsets_asks_for_one(hub: StandInHub, tmp_path: Path) -> None:
    hub.repos["datasets/made/set"] = Repo.of({"s/a.parquet": parquet_file(0, 1)}, card=CARD)
    message = failing(hub, tmp_path)
    assert (
        message
        == "made/set has the subsets folder, large, small. Set source.subset to one of them in the dataset's YAML."
    )


def test_the_hubs_own_conversion_serves_where_a_repository_has_no_parquet(hub: StandInHub, tmp_path: Path) -> None:
    repo = Repo.of({"train.zip": b"images"})
    repo.commits[commit_of("converted")] = {"default/train/0000.parquet": parquet_file(0, 3)}
    repo.refs["refs/convert/parquet"] = commit_of("converted")
    hub.repos["datasets/made/set"] = repo
    raw, rows = ingested(hub, tmp_path)
    assert raw.revision == commit_of("converted") and len(rows) == 3
    assert "set source.revision to 'refs/convert/parquet'" in failing(hub, tmp_path / "b", revision="main")


def test_a_file_that_lacks_the_column_is_named(hub: StandInHub, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [b""], "label": [0], "words": ["a"]}), buffer)
    files = {"data/train-0.parquet": parquet_file(0, 1), "data/train-1.parquet": buffer.getvalue()}
    hub.repos["datasets/made/set"] = Repo.of(files)
    with pytest.raises(DataError, match="data/train-1.parquet of made/set has no column 'text'; its columns are image"):
        ingested(hub, tmp_path)


def test_a_file_that_is_not_parquet_is_named(hub: StandInHub, tmp_path: Path) -> None:
    hub.repos["datasets/made/set"] = Repo.of({"data/train-0.parquet": b"version https://git-lfs"})
    assert "data/train-0.parquet of made/set cannot be read as Parquet" in failing(hub, tmp_path)


def test_files_of_a_split_are_found_by_their_names() -> None:
    names = ["default/train/0000.parquet", "default/test/0000.parquet", "x/val-0.parquet", "trainer.parquet"]
    assert split_files(names, "train") == ["default/train/0000.parquet"]
    assert split_files(["a.parquet", "b-test.parquet"], "train") == ["a.parquet"]
