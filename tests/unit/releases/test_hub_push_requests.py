"""A release pushed to a stand-in Hub by huggingface_hub itself, in a process with a planted token."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_assets.artifacts import read_manifest, sha256_file
from tests.integration.stand_in_hub import GOOD_TOKEN, OTHER_TOKEN, Fault, Repo, StandInHub, running_hub
from tests.unit.releases.test_publish import make_run, release

pytestmark = pytest.mark.not_fast

PUSH = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from mllm_assets.errors import MllmAssetsError
from mllm_assets.releases.hub_push import PushSpec, push
try:
    print(json.dumps(asdict(push(Path(sys.argv[1]), PushSpec(**json.loads(sys.argv[2]))))))
except MllmAssetsError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def pushed(hub: StandInHub, directory: Path, token: str, **spec: object) -> subprocess.CompletedProcess[str]:
    # the stand-in speaks LFS, which the library falls back to; Xet's own protocol has no such server
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    options = json.dumps({"repo_id": "me/pets", "dry_run": False, **spec})
    command = [sys.executable, "-c", PUSH, str(directory), options]
    return subprocess.run(
        command, env={**env, "HF_TOKEN": token}, capture_output=True, text=True, check=False, timeout=120
    )


def test_a_push_is_one_commit_of_the_very_files_in_a_private_repository(tmp_path: Path) -> None:
    made = release(make_run(tmp_path / "run"), tmp_path)
    with running_hub() as hub:
        process = pushed(hub, made.directory, GOOD_TOKEN, revision="candidate")
        assert process.returncode == 0, process.stderr
        result = json.loads(process.stdout)
        repo = hub.repos["models/me/pets"]
        num_uploads = hub.count("PUT /upload/")
        again = pushed(hub, made.directory, GOOD_TOKEN, revision="candidate")
        assert hub.count("PUT /upload/") == num_uploads, "what is there is not sent twice"
    assert repo.private and repo.refs["candidate"] != repo.refs["main"]
    there = repo.commits[result["commit"]]
    for name, data in there.items():
        if name != ".gitattributes":
            assert (made.directory / name).read_bytes() == data
    assert {"README.md", "config.json", "model.safetensors", "adapter/adapter_config.json"} <= there.keys()
    assert not {"predictions.parquet", "manifest.json"} & there.keys()
    weights = sha256_file(made.directory / "model.safetensors")
    assert weights in hub.blobs, "the weights came over LFS"
    digest = read_manifest(made.directory)["weights_digest"][:16]
    assert hub.messages[0] == f"pets v1, weights {digest}" and result["repo_url"] == f"{hub.endpoint}/me/pets"
    assert again.returncode == 0
    assert GOOD_TOKEN not in process.stdout + process.stderr


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (OTHER_TOKEN, r"SourceError: HF_TOKEN may not write to me/pets \(403\). Use a token with the role write"),
        ("hf_expired", r"SourceError: The Hub does not accept HF_TOKEN for me/pets: it is wrong, has expired"),
    ],
)
def test_a_token_that_may_not_write_is_said_and_not_shown(tmp_path: Path, token: str, message: str) -> None:
    made = release(make_run(tmp_path / "run"), tmp_path)
    with running_hub() as hub:
        process = pushed(hub, made.directory, token)
    assert process.returncode == 1 and hub.repos == {}
    [line] = process.stderr.strip().splitlines()
    assert re.match(message, line), line
    assert token not in process.stdout + process.stderr


def test_a_model_that_is_to_be_private_is_not_pushed_to_a_public_repository(tmp_path: Path) -> None:
    """The Hub ignores `private` for a repository that is there."""
    made = release(make_run(tmp_path / "run"), tmp_path)
    with running_hub() as hub:
        hub.repos["models/me/pets"] = Repo.of({"README.md": b"mine"})
        refused = pushed(hub, made.directory, GOOD_TOKEN)
        assert refused.returncode == 1 and "me/pets is there already, and public" in refused.stderr
        assert hub.count("/commit/") == 0
        assert pushed(hub, made.directory, GOOD_TOKEN, private=False).returncode == 0


def test_a_hub_that_fails_before_the_commit_holds_nothing_of_the_release(tmp_path: Path) -> None:
    made = release(make_run(tmp_path / "run"), tmp_path)
    with running_hub() as hub:
        hub.faults = [Fault("POST .*/commit/", status=500)]
        process = pushed(hub, made.directory, GOOD_TOKEN)
        repo = hub.repos["models/me/pets"]
    assert process.returncode == 1 and "Nothing was committed" in process.stderr
    assert repo.commits[repo.head] == {".gitattributes": b""}


def test_a_release_with_a_changed_byte_is_not_pushed(tmp_path: Path) -> None:
    made = release(make_run(tmp_path / "run"), tmp_path)
    (made.directory / "config.json").chmod(0o644)
    (made.directory / "config.json").write_text('{"a": 1}')
    with running_hub() as hub:
        process = pushed(hub, made.directory, GOOD_TOKEN)
    assert (
        process.returncode == 1 and "IntegrityError" in process.stderr and "config.json has 8 bytes" in process.stderr
    )
    assert hub.requests == []
