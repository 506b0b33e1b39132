"""The Hub source against a stand-in Hub, through the real client."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mllm_assets.hub.errors
from mllm_assets.data.ingest.hub import read_hub
from mllm_assets.data.ingest.hub_files import BUFFER_BYTES, split_files
from mllm_assets.data.ingest.raw_files import read_raw
from mllm_assets.data.ingest.sources import RawDataset, ingest
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.ingest.split_spec import SplitSpec
from mllm_assets.errors import DataError, SourceError
from mllm_assets.layout import Layout
from tests.integration.stand_in_hub import (
    GOOD_TOKEN,
    OTHER_TOKEN,
    SIGNATURE,
    Fault,
    Repo,
    StandInHub,
    commit_of,
    running_hub,
)

pytestmark = pytest.mark.integration

FILES_READ = r"GET /datasets/\S+/resolve/\S+\.parquet"


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet_file(first: int, count: int, *, group_rows: int = 10, num_bytes: int | None = None) -> bytes:
    """Rows `first` and on: a picture, or so many random bytes, with its number as text and its parity as class."""
    features = {"image": {"_type": "Image"}, "label": {"names": ["even", "odd"], "_type": "ClassLabel"}}
    features["text"] = {"dtype": "string", "_type": "Value"}
    numbers = range(first, first + count)
    images = [
        {"bytes": png(number) if num_bytes is None else os.urandom(num_bytes), "path": None} for number in numbers
    ]
    columns = {"image": images, "text": [f"picture {number}" for number in numbers], "label": [n % 2 for n in numbers]}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    buffer = io.BytesIO()
    # pages of few rows, and no picture in the footer, as the Hub's files of pictures have it
    pq.write_table(table, buffer, row_group_size=group_rows, write_batch_size=16, write_statistics=False)
    return buffer.getvalue()


FILES = {
    "README.md": b"made",
    "data/train-00000-of-00002.parquet": parquet_file(0, 100),
    "data/train-00001-of-00002.parquet": parquet_file(100, 60),
    "data/validation-00000-of-00001.parquet": parquet_file(500, 10),
}


@pytest.fixture(scope="module")
def servers() -> Iterator[StandInHub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(servers: StandInHub, monkeypatch: pytest.MonkeyPatch) -> StandInHub:
    """The Hub with one dataset, in a process that is not offline and has no token."""
    servers.forget()
    servers.repos = {"datasets/made/set": Repo.of(FILES)}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(mllm_assets.hub.errors, "WAITS_S", (0.01,) * 4)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return servers


def hub_spec(num_train: int = 20, num_val: int = 5, **source: Any) -> DatasetSpec:
    return DatasetSpec(
        name="made",
        source=SourceSpec(kind="huggingface", **{"repo": "made/set", "label_column": "label", **source}),
        prompts=("What?",),
        split=SplitSpec(num_train=num_train, num_val=num_val, num_test=0),
    )


def ingested(hub: StandInHub, root: Path, spec: DatasetSpec | None = None) -> tuple[RawDataset, list[dict[str, Any]]]:
    raw = ingest(spec or hub_spec(), Layout(root), hub_endpoint=hub.endpoint)
    return raw, list(read_raw(raw.directory))


def failing(hub: StandInHub, root: Path, **source: Any) -> str:
    with pytest.raises(SourceError) as caught:
        ingested(hub, root, hub_spec(**source))
    shown = "".join(traceback.format_exception(caught.value))
    assert SIGNATURE not in shown and os.environ.get("HF_TOKEN", SIGNATURE) not in shown
    assert [path for path in root.rglob("*") if path.is_file()] == []
    return str(caught.value)


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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"repo": "made/none"}, "The dataset 'made/none' does not exist on the Hub, or is private. Correct source"),
        ({"repo": "off/set"}, "The dataset off/set was disabled by the Hub. Set source.repo in the dataset's YAML to"),
        ({"revision": "gone"}, "has no revision 'gone'. Correct the revision next to source.repo"),
        ({"split": "test"}, "has no Parquet files of the split 'test'. Correct source.split"),
        ({"repo": "lambdalabs/pokemon-blip-captions"}, "It was withdrawn from the Hub in 2024"),
        ({"repo": "no id/at all"}, "'no id/at all' is not an id of the Hub. Write it as owner/name in source.repo"),
    ],
)
def test_what_the_hub_refuses_is_said_at_once_with_the_cure(
    hub: StandInHub, tmp_path: Path, source: dict[str, Any], message: str
) -> None:
    hub.repos["datasets/off/set"] = Repo.of(FILES, disabled=True)
    assert message in failing(hub, tmp_path, **source)
    assert len(hub.requests) <= 2  # nothing here passes by trying again


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "made/set is gated. Accept its terms on its page on the Hub, then set HF_TOKEN to a token of that"),
        (OTHER_TOKEN, "is gated, and the account of HF_TOKEN has no access yet. Accept its terms on its page on the"),
        ("hf_expired", "The Hub does not accept HF_TOKEN for made/set: it is wrong, has expired or was revoked."),
        ("hf_two words", "HF_TOKEN holds a space, line break or letter that no token has. Copy the token again"),
        ("hf_sm\N{RIGHT SINGLE QUOTATION MARK}rt", "HF_TOKEN holds a space, line break or letter"),
    ],
)
def test_a_gated_dataset_says_what_its_token_lacks_and_never_the_token(
    hub: StandInHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    token: str | None,
    message: str,
) -> None:
    hub.repos["datasets/made/set"].gated = True
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    said = failing(hub, tmp_path, revision="main")
    assert message in said
    assert token is None or token not in said + caplog.text


def test_a_gated_dataset_is_read_with_a_token_that_the_cdn_never_sees(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.repos["datasets/made/set"].gated = True
    monkeypatch.setenv("HF_TOKEN", f"{GOOD_TOKEN}\n")  # as `export HF_TOKEN=$(cat file)` of some shells gives it
    caplog.set_level("WARNING")
    ingested(hub, tmp_path)
    assert {request.token for request in hub.requests if not request.on_cdn} == {GOOD_TOKEN}
    assert {request.token for request in hub.requests if request.on_cdn} == {None}
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert GOOD_TOKEN.encode() not in written and GOOD_TOKEN not in caplog.text


def test_a_server_that_echoes_the_token_is_not_quoted(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    caplog.set_level("INFO")
    echo = {"X-Error-Message": f"no {GOOD_TOKEN} here"}
    hub.faults = [Fault("GET /blob", 1000, status=400, headers=echo)]
    assert "made/set cannot be fetched from the Hub (Bad request" in failing(hub, tmp_path)
    hub.faults = [Fault("GET .*resolve", 1000, status=403, headers=echo)]
    assert "The Hub forbids reading made/set. Give the token in HF_TOKEN the right to" in failing(hub, tmp_path)
    quoted = f"Bearer {GOOD_TOKEN} https://me:word@hub.test/a?{SIGNATURE}"
    assert mllm_assets.hub.errors.scrubbed(quoted) == "Bearer HF_TOKEN https://hub.test/a"
    assert GOOD_TOKEN not in caplog.text


def test_a_token_stored_on_the_machine_is_not_sent(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(GOOD_TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    ingested(hub, tmp_path)
    assert {request.token for request in hub.requests} == {None}


def test_what_passes_is_tried_again_and_the_result_is_the_same(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = ingested(hub, tmp_path / "calm")
    asked: list[float] = []
    monkeypatch.setattr("mllm_assets.hub.errors.time.sleep", asked.append)
    hub.forget()
    hub.faults = [  # one read may meet all of the last two kinds, and five tries is all it has
        Fault("GET /api/datasets/made/set", 1, status=429, headers={"Retry-After": "7"}),
        Fault("GET /api/datasets/made/set", 1, status=500),
        Fault("POST .*paths-info", 2, status=503),
        Fault("GET .*resolve", 1, status=429, headers={"RateLimit": '"resolvers";r=0;t=41'}),
        Fault("GET .*resolve", 1, status=502, headers={"Retry-After": "3"}),
        Fault("GET /blob", 1, cut_after=1000),
        Fault("GET /blob", 1, status=504),
    ]
    raw, _ = ingested(hub, tmp_path / "rough")
    assert raw.digest == expected.digest
    assert [fault.times for fault in hub.faults] == [0] * len(hub.faults)
    assert sorted(wait for wait in asked if wait >= 1) == [3.0, 7.0, 42.0]


def test_retries_are_bounded(hub: StandInHub, tmp_path: Path) -> None:
    hub.faults = [Fault("GET /blob", 1000, status=503)]
    message = failing(hub, tmp_path)
    assert "made/set cannot be fetched from the Hub (Server error '503 Service Unavailable'" in message
    assert SIGNATURE not in message
    assert max(sum(r.path == path for r in hub.requests) for path in {r.path for r in hub.requests if r.on_cdn}) == 5


def test_a_wait_of_an_hour_is_not_waited_but_said(hub: StandInHub, tmp_path: Path) -> None:
    hub.faults = [Fault("GET /api/datasets", 1, status=429, headers={"Retry-After": "3600"})]
    started_s = time.monotonic()
    message = failing(hub, tmp_path)
    assert message.startswith("The Hub limits requests (429). Materialise again in 3600 s; with HF_TOKEN set")
    assert time.monotonic() - started_s < 600


def test_a_proxy_that_ignores_ranges_is_named_before_the_whole_file_is_read(hub: StandInHub, tmp_path: Path) -> None:
    hub.repos["datasets/made/set"] = Repo.of({"data/train.parquet": parquet_file(0, 200, num_bytes=100_000)})
    hub.faults = [Fault("GET /blob", 1000, ignores_range=True)]
    assert "the Hub answered 200 instead of bytes" in failing(hub, tmp_path)


def test_a_hub_that_cannot_be_reached_fails_within_ten_seconds_with_what_to_do(hub: StandInHub, tmp_path: Path) -> None:
    """`datasets` retries for 28 s first."""
    with socket.socket() as silent:  # takes the connection and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started_s = time.monotonic()
        with pytest.raises(SourceError, match="made/set cannot be fetched .* The embedded dataset needs no network"):
            ingest(hub_spec(), Layout(tmp_path), hub_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started_s < 10
        port = silent.getsockname()[1]
    started_s = time.monotonic()
    with pytest.raises(SourceError, match="Connection refused.*Check the network and HF_ENDPOINT"):
        ingest(hub_spec(), Layout(tmp_path), hub_endpoint=f"http://127.0.0.1:{port}")
    assert time.monotonic() - started_s < 10


def test_offline_mode_is_named(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "made/set cannot be fetched because HF_HUB_OFFLINE is set" in failing(hub, tmp_path)


INGEST = """
import sys
from pathlib import Path
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.ingest.split_spec import SplitSpec
from mllm_assets.layout import Layout

source = SourceSpec(kind="huggingface", repo="made/set", label_column="label")
split = SplitSpec(num_train=20, num_val=5)
ingest(DatasetSpec(name="made", source=source, prompts=("What?",), split=split), Layout(Path(sys.argv[1])))
"""


def test_what_a_killed_ingest_left_is_deleted_by_the_next(hub: StandInHub, tmp_path: Path) -> None:
    expected, _ = ingested(hub, tmp_path / "calm")
    hub.forget()
    hub.stall_after(FILES_READ, 6)
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
    process = subprocess.Popen([sys.executable, "-c", INGEST, str(tmp_path)], env=env)
    assert hub.stalled.wait(300)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    hub.go_on()
    raw_folder = tmp_path / "data" / ".raw" / "made"
    assert list(raw_folder.glob(".*.tmp"))
    raw, _ = ingested(hub, tmp_path)
    assert raw.digest == expected.digest
    assert [path.name for path in raw_folder.iterdir()] == [raw.digest]
