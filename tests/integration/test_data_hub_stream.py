"""Hub datasets without Parquet files, read through `datasets`' streaming against the stand-in Hub."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mllm_assets.data.ingest.images import sha256
from tests.integration.stand_in_hub import Fault, Repo, commit_of, running_hub
from tests.unit.data.made_datasets import png

pytestmark = pytest.mark.integration

# `datasets` reads the Hub's address once, when it is imported
READ = """
import json, sys
from mllm_assets.data.ingest.hub import read_hub
from mllm_assets.data.ingest.images import sha256
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec, SplitSpec
from mllm_assets.errors import MllmAssetsError
for repo, columns in json.loads(sys.argv[1]).items():
    source = SourceSpec(kind="huggingface", repo=f"me/{repo}", **columns)
    spec = DatasetSpec(name="made", prompts=("?",), source=source, split=SplitSpec(num_train=3, num_val=1, num_test=0))
    try:
        commit, rows = read_hub(spec)
        print(json.dumps([commit, [[row.caption, *map(sha256, row.images), row.defect] for row in rows]]))
    except MllmAssetsError as error:
        print(json.dumps(str(error)))
"""


def tar_of(count: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for n in range(count):
            for suffix, data in (("png", png(n)), ("txt", f"picture {n}".encode())):
                member = tarfile.TarInfo(f"{n:04}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_repositories_without_parquet_are_streamed_at_their_commit(tmp_path: Path) -> None:
    """They were refused; pictures come as their own bytes, and a transient error is retried."""
    facts = "".join(json.dumps({"file_name": f"{n}.png", "text": f"picture {n}"}) + "\n" for n in range(8))
    loose = {f"train/{n}.png": png(n) for n in range(8)} | {"train/metadata.jsonl": facts.encode()}
    lines = "".join(json.dumps({"image": f"img/{n}.png", "caption": f"picture {n}"}) + "\n" for n in range(8))
    named = {f"img/{n}.png": png(n) for n in range(8)} | {"train.jsonl": lines.encode()}
    with running_hub() as hub:
        hub.repos |= {
            "datasets/me/loose": Repo.of(loose),
            "datasets/me/named": Repo.of(named),
            "datasets/me/tars": Repo.of({"train-0.tar": tar_of(8)}),
            "datasets/me/empty": Repo.of({"README.md": b"nothing"}),
        }
        hub.faults.append(Fault(r"GET /datasets/me/named/resolve/.*/2\.png", times=2, status=503))
        asked = {"loose": {}, "named": {"caption_column": "caption"}, "empty": {},
                 "tars": {"image_column": "png", "caption_column": "txt"}, "gone": {}}  # fmt: skip
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        made = subprocess.run(
            [sys.executable, "-c", READ, json.dumps(asked)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert made.returncode == 0, made.stderr
    found = dict(zip(asked, map(json.loads, made.stdout.splitlines()), strict=True))
    expected = [commit_of("first"), [[f"picture {n}", sha256(png(n)), None] for n in range(5)]]
    assert [found[name] for name in ("loose", "named", "tars")] == [expected] * 3
    assert found["empty"].startswith("me/empty has no Parquet files, and cannot be read as a stream either")
    assert "'me/gone' does not exist on the Hub, or is private" in found["gone"]
    assert not list(tmp_path.rglob("*.png"))  # nothing is kept
