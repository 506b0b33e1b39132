"""Pretrained models from a stand-in Hub, through the real client."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from mllm_assets.artifacts import find_damage, read_manifest
from mllm_assets.errors import MachineError, MllmAssetsError, ModelError, SourceError
from mllm_assets.training.runs.models import PretrainedResult, fetch_snapshot
from tests.integration.stand_in_hub import GOOD_TOKEN, OTHER_TOKEN, Fault, Repo, StandInHub, commit_of

pytestmark = pytest.mark.integration

CHUNK_BYTES = 64 * 1024
SHARDS = [f"model-{n:05}-of-00002.safetensors" for n in (1, 2)]


def weights(seed: int, num_bytes: int = 400_000) -> bytes:
    numbers = np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)
    return save({f"layer{seed}.weight": numbers})


GOOD = {
    "config.json": b'{"model_type": "gemma3"}',
    "model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode(),
    "tokenizer.model": b"sentencepiece",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"made",
    "README.md": b"made",
    **{name: weights(seed) for seed, name in enumerate(SHARDS)},
}
BAD = {
    "modeling_made.py": b"import os",
    "pytorch_model.bin": b"pickle" * 1000,
    "training_args.pt": b"pickle",
    "scheduler.pkl": b"pickle",
    "weights.model": b"pickle",
    "consolidated.safetensors": weights(9),
    "original/config.json": b"{}",
    ".gitattributes": b"",
    "manifest.json": b"{}",
}


@pytest.fixture
def hub(empty_hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> StandInHub:
    """The Hub with one model; chunks are small."""
    empty_hub.repos = {"models/made/model": Repo.of({**GOOD, **BAD})}
    monkeypatch.setattr("mllm_assets.hub.snapshot.CHUNK_BYTES", CHUNK_BYTES)
    return empty_hub


def fetched(hub: StandInHub, root: Path, revision: str | None = "main") -> PretrainedResult:
    return fetch_snapshot("made/model", revision, root / "made", endpoint=hub.endpoint)


def failing(hub: StandInHub, root: Path, kind: type[MllmAssetsError] = SourceError) -> str:
    with pytest.raises(kind) as caught:
        fetched(hub, root)
    assert not (root / "made").exists()
    return str(caught.value)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_snapshot_is_whole_verified_and_recorded_and_holds_nothing_that_can_carry_code(
    hub: StandInHub, tmp_path: Path
) -> None:
    lines: list[str] = []
    result = fetch_snapshot("made/model", "main", tmp_path / "made", endpoint=hub.endpoint, notify=lines.append)
    manifest = read_manifest(result.directory)
    assert result.revision == hub.repos["models/made/model"].head == manifest["revision"]
    assert (manifest["repo"], manifest["requested_revision"]) == ("made/model", "main")
    found = contents(result.directory)
    del found["manifest.json"]
    assert found == GOOD
    assert not any(hub.count(f"resolve/.*/{name}") for name in BAD)
    assert lines[-1] == "made/model: 0.00 of 0.00 GiB"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".made.lock", "made"]


def test_a_model_that_is_there_needs_no_hub(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetched(hub, tmp_path)
    hub.repos["models/made/model"].refs["main"] = "moved"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetched(hub, tmp_path) == first
    assert fetched(hub, tmp_path, first.revision) == first  # pinned in the YAML to what was recorded


def test_another_revision_in_the_yaml_replaces_what_was_fetched(hub: StandInHub, tmp_path: Path) -> None:
    first = fetched(hub, tmp_path)
    repo = hub.repos["models/made/model"]
    repo.commits[commit_of("v2")] = {"config.json": b"{}", "model.safetensors": weights(5)}
    repo.refs["v2"] = commit_of("v2")
    second = fetched(hub, tmp_path, "v2")
    assert second.revision == commit_of("v2") and second.fingerprint != first.fingerprint
    assert set(contents(second.directory)) == {"config.json", "model.safetensors", "manifest.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".made.lock", "made"]


def test_a_model_of_the_users_own_is_never_replaced(hub: StandInHub, tmp_path: Path) -> None:
    for name, files in (("bare", {"config.json": "{}"}), ("made_here", {"config.json": "{}", "manifest.json": "{}"})):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text if file != "manifest.json" else '{"files": {}}')
        assert fetch_snapshot("made/model", "main", tmp_path / name, endpoint=hub.endpoint).revision is None
    assert hub.requests == []


def test_a_fetched_model_that_was_changed_is_fetched_again_and_the_changed_files_are_kept(
    hub: StandInHub, tmp_path: Path
) -> None:
    (fetched(hub, tmp_path).directory / SHARDS[0]).write_bytes(b"mine")
    assert find_damage(fetched(hub, tmp_path).directory) is None
    [aside] = [path for path in tmp_path.iterdir() if path.name not in (".made.lock", "made")]
    assert (aside / SHARDS[0]).read_bytes() == b"mine"


def test_a_broken_download_goes_on_at_the_byte_where_it_stopped(hub: StandInHub, tmp_path: Path) -> None:
    hub.faults = [Fault("GET /blob", 6), Fault("GET /blob", 1000, status=503)]  # six chunks come
    assert "made/model cannot be fetched from the Hub (Server error '503" in failing(hub, tmp_path)
    [part] = (tmp_path / ".made.download").glob("*.part")
    num_stored = part.stat().st_size
    assert 0 < num_stored < len(GOOD[SHARDS[0]]) and num_stored % CHUNK_BYTES == 0
    hub.forget()
    result = fetched(hub, tmp_path)
    ranges = [request.range or "" for request in hub.requests if request.path.endswith(SHARDS[0])]
    assert min(int(asked.removeprefix("bytes=").split("-")[0]) for asked in ranges) == num_stored
    assert hub.count("resolve/.*/config.json") == 0
    assert find_damage(result.directory) is None
    assert {name: data for name, data in contents(result.directory).items() if name != "manifest.json"} == GOOD


def test_cut_off_answers_and_limits_are_overcome(hub: StandInHub, tmp_path: Path) -> None:
    hub.faults = [
        Fault("GET /blob", 3, cut_after=1000),
        Fault("GET .*resolve", 2, status=429, headers={"Retry-After": "0"}),
        Fault("GET /blob", 2, status=500),
    ]
    assert find_damage(fetched(hub, tmp_path).directory) is None
    assert [fault.times for fault in hub.faults] == [0, 0, 0]


FETCH = """
import sys
from pathlib import Path
import mllm_assets.hub.snapshot
from mllm_assets.training.runs.models import fetch_snapshot

mllm_assets.hub.snapshot.CHUNK_BYTES = 64 * 1024
fetch_snapshot("made/model", "main", Path(sys.argv[1]) / "made")
"""


def test_killed_in_the_middle_nothing_is_published_and_the_next_run_goes_on(hub: StandInHub, tmp_path: Path) -> None:
    hub.kill_when_stalled(FETCH, tmp_path, after=("GET /blob", 7))
    assert not (tmp_path / "made").exists()
    num_stored = sum(path.stat().st_size for path in (tmp_path / ".made.download").iterdir())
    assert num_stored > CHUNK_BYTES
    hub.forget()
    result = fetched(hub, tmp_path)
    assert find_damage(result.directory) is None
    assert hub.num_body_bytes < sum(map(len, GOOD.values())) - num_stored + 10_000  # the API's answers are small
    assert not (tmp_path / ".made.download").exists()


def test_a_branch_that_moved_since_the_broken_download_mixes_no_files(hub: StandInHub, tmp_path: Path) -> None:
    hub.faults = [Fault(f"GET .*{SHARDS[1]}", 1000, status=503)]
    failing(hub, tmp_path)
    repo = hub.repos["models/made/model"]
    moved = {name: data for name, data in GOOD.items() if name != "LICENSE"} | {SHARDS[0]: weights(7)}
    repo.commits[commit_of("moved")], repo.refs["main"] = moved, commit_of("moved")
    hub.forget()
    result = fetched(hub, tmp_path)
    assert result.revision == commit_of("moved")
    assert {name: data for name, data in contents(result.directory).items() if name != "manifest.json"} == moved


def test_a_damaged_remainder_is_fetched_once_more(hub: StandInHub, tmp_path: Path) -> None:
    """After a power cut a file may hold zeros where its last bytes were."""
    hub.faults = [Fault(f"GET .*{SHARDS[1]}", 1000, status=503)]
    failing(hub, tmp_path)
    digest = next(key for key, data in hub.blobs.items() if data == GOOD[SHARDS[1]]) if hub.blobs else ""
    (tmp_path / ".made.download" / f"{SHARDS[1]}.{digest[:16]}.part").write_bytes(bytes(CHUNK_BYTES))
    hub.forget()
    result = fetched(hub, tmp_path)
    assert (result.directory / SHARDS[1]).read_bytes() == GOOD[SHARDS[1]]


def test_a_file_that_is_not_what_the_hub_says_is_refused(hub: StandInHub, tmp_path: Path) -> None:
    hub.faults = [Fault("GET /blob", 1, flips_a_bit=True)]
    message = failing(hub, tmp_path)
    assert f"{SHARDS[0]} of made/model does not match its digest on the Hub. Materialise again" in message
    assert find_damage(fetched(hub, tmp_path).directory) is None


def test_a_disk_that_is_too_small_is_said_before_a_byte_is_fetched(hub: StandInHub, tmp_path: Path) -> None:
    free_gib = shutil.disk_usage(tmp_path).free / 2**30
    hub.repos["models/made/model"].claimed_sizes = {SHARDS[1]: int((free_gib + 1000) * 2**30)}
    said = re.fullmatch(
        r"made/model needs ([\d.]+) GiB more in (\S+), but only ([\d.]+) GiB are free there. "
        r"Free ([\d.]+) GiB \(mllm-assets gc lists what can go\), or set MLLM_ASSETS_ROOT to a folder on a larger "
        "disk.",
        failing(hub, tmp_path, MachineError),
    )
    assert said is not None and said[2] == str(tmp_path)
    # other processes write to the same disk
    assert [float(said[n]) for n in (1, 3, 4)] == pytest.approx([free_gib + 1000, free_gib, 1000], abs=20)
    assert hub.count("resolve") == 0


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "The model made/model is gated. Accept its terms on its page on the Hub, then set HF_TOKEN"),
        (OTHER_TOKEN, "is gated, and the account of HF_TOKEN has no access yet. Accept its terms"),
        (GOOD_TOKEN, None),
    ],
)
def test_a_gated_model_comes_with_a_token_that_has_access_only(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, message: str | None
) -> None:
    hub.repos["models/made/model"].gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    if message is None:
        result = fetched(hub, tmp_path)
        assert GOOD_TOKEN not in (result.directory / "manifest.json").read_text()
        assert {request.token for request in hub.requests if request.on_cdn} == {None}
    else:
        said = failing(hub, tmp_path)
        assert message in said and "pretrains/gemma3_tiny needs no network" in said
        assert hub.count("resolve") == 1  # the smallest file


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"p"}, "has no weights as safetensors; other formats can carry"),
        ({"model.safetensors": b"p"}, "holds no config.json, so it is not a model. Correct repo in defs/pretrained"),
        (
            {name: data for name, data in GOOD.items() if name != SHARDS[1]},
            f"model.safetensors.index.json names {SHARDS[1]}, which does not exist",
        ),
    ],
)
def test_a_repository_that_holds_no_usable_model_is_refused(
    hub: StandInHub, tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    hub.repos["models/made/model"] = Repo.of(files)
    assert message in failing(hub, tmp_path, ModelError)
