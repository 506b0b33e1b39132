"""The Hub source against a Hub that refuses, is slow, breaks off or cannot be reached."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest

import mllm_assets.hub.errors
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.errors import SourceError
from mllm_assets.layout import Layout
from tests.integration.hub_datasets import FILES, FILES_READ, failing, hub_spec, ingested, parquet_file
from tests.integration.stand_in_hub import GOOD_TOKEN, OTHER_TOKEN, SIGNATURE, Fault, Repo, StandInHub

pytestmark = pytest.mark.integration


@pytest.fixture
def hub(empty_hub: StandInHub) -> StandInHub:
    """The Hub with one dataset."""
    empty_hub.repos = {"datasets/made/set": Repo.of(FILES)}
    return empty_hub


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
    hub.kill_when_stalled(INGEST, tmp_path, after=(FILES_READ, 6))
    raw_folder = tmp_path / "data" / ".raw" / "made"
    assert list(raw_folder.glob(".*.tmp"))
    raw, _ = ingested(hub, tmp_path)
    assert raw.digest == expected.digest
    assert [path.name for path in raw_folder.iterdir()] == [raw.digest]
