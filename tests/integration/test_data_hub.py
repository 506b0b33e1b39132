"""The Hub source against a small Hub on this machine, through the real client, in a process that is not offline."""

import hashlib
import http.server
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytestmark = pytest.mark.integration

COMMIT = "1ed13e8" + "0" * 33
SCRIPT = """
import sys, json
from pathlib import Path
from mllm_assets.data.sources import ingest, read_raw
from mllm_assets.data.spec import DatasetSpec, SourceSpec, SplitSpec
from mllm_assets.errors import MllmAssetsError
from mllm_assets.layout import Layout

root, endpoint, source = sys.argv[1:]
spec = DatasetSpec(
    name="made", source=SourceSpec(kind="huggingface", **json.loads(source)), prompts=("What?",),
    split=SplitSpec(num_train=20, num_val=5),
)
try:
    raw = ingest(spec, Layout(Path(root)), hub_endpoint=endpoint or None)
except MllmAssetsError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
else:
    rows = list(read_raw(raw.directory))
    print(json.dumps({
        "digest": raw.digest, "revision": raw.revision, "rows": [r["row_index"] for r in rows],
        "captions": [r["caption"] for r in rows], "labels": [r["label"] for r in rows],
    }))
"""


def parquet_file(first: int, count: int) -> bytes:
    def png(seed: int) -> bytes:
        buffer = io.BytesIO()
        noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, "PNG")
        return buffer.getvalue()

    features = {"image": {"_type": "Image"}, "label": {"names": ["even", "odd"], "_type": "ClassLabel"}}
    numbers = range(first, first + count)
    table = pa.table(
        {
            "image": [{"bytes": png(number), "path": None} for number in numbers],
            "text": [f"picture {number}" for number in numbers],
            "label": [number % 2 for number in numbers],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=10)
    return buffer.getvalue()


FILES = {
    "data/train-00000-of-00002.parquet": parquet_file(0, 100),
    "data/train-00001-of-00002.parquet": parquet_file(100, 60),
    "data/validation-00000-of-00001.parquet": parquet_file(500, 10),
}


class SmallHub(http.server.BaseHTTPRequestHandler):
    """Just what reading a public dataset by ranges asks for: revision, tree, paths-info, resolve."""

    protocol_version = "HTTP/1.1"
    tokens: list[str | None] = []

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the terminal."""

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self) -> None:
        self.tokens.append(self.headers.get("Authorization"))
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        if "/gated/" in self.path:
            self.reply(403, b"{}", X_Error_Code="GatedRepo")
        elif not self.path.startswith(("/api/datasets/made/set", "/datasets/made/set")):
            self.reply(404, b"{}", X_Error_Code="RepoNotFound")
        elif "/revision/" in self.path or re.fullmatch(r"/api/datasets/made/set(\?.*)?", self.path):
            if "/revision/gone" in self.path:
                self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
            else:
                siblings = [{"rfilename": name} for name in ("README.md", *FILES)]
                self.reply(200, json.dumps({"id": "made/set", "sha": COMMIT, "siblings": siblings}).encode())
        elif "/paths-info/" in self.path or "/tree/" in self.path:
            infos = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in FILES.items()
                if "/tree/" in self.path or name in body.replace("%2F", "/")
            ]
            self.reply(200, json.dumps(infos).encode(), Content_Type="application/json")
        else:
            self.resolve()

    def resolve(self) -> None:
        data = FILES[self.path.split(f"/resolve/{COMMIT}/")[1]]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        common = {"ETag": '"etag"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if asked is None:
            self.reply(200, data, **common)
            return
        start, end = int(asked[1]), min(int(asked[2]), len(data) - 1)
        self.reply(206, data[start : end + 1], Content_Range=f"bytes {start}-{end}/{len(data)}", **common)

    do_GET = do_HEAD = do_POST = answer


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SmallHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def ingest_apart(root: Path, endpoint: str, source: dict[str, Any], **env: str) -> dict[str, Any]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root), endpoint, json.dumps(source)],
        env={**inherited, "HF_HOME": str(root / "hf"), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_sample_of_row_groups_is_read_at_a_pinned_commit(hub: str, tmp_path: Path) -> None:
    source = {"repo": "made/set", "label_column": "label"}
    first = ingest_apart(tmp_path / "a", hub, source)
    assert first["revision"] == COMMIT
    assert len(first["rows"]) == 30  # a fifth more than the 25 that the splits ask for
    assert first["rows"] == sorted(set(first["rows"]))
    assert first["captions"] == [f"picture {row}" for row in first["rows"]]
    assert first["labels"] == ["odd" if row % 2 else "even" for row in first["rows"]]
    assert max(first["rows"]) > 100 and min(first["rows"]) < 100
    assert ingest_apart(tmp_path / "b", hub, source) == first


def test_another_split_is_read_whole_where_it_is_small(hub: str, tmp_path: Path) -> None:
    result = ingest_apart(tmp_path, hub, {"repo": "made/set", "split": "validation"})
    assert result["captions"] == [f"picture {number}" for number in range(500, 510)]


def test_the_token_comes_from_the_environment_only(hub: str, tmp_path: Path) -> None:
    stored = tmp_path / "hf" / "token"
    stored.parent.mkdir(parents=True)
    stored.write_text("hf_stored")
    SmallHub.tokens.clear()
    ingest_apart(tmp_path, hub, {"repo": "made/set"})
    assert set(SmallHub.tokens) == {None}
    SmallHub.tokens.clear()
    result = ingest_apart(tmp_path, hub, {"repo": "made/set"}, HF_TOKEN="hf_secret")
    assert "Bearer hf_secret" in SmallHub.tokens
    assert "hf_secret" not in json.dumps(result)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"repo": "made/none"}, "There is no dataset 'made/none' on the Hub, or it is private"),
        ({"repo": "gated/set"}, "gated/set is gated. Accept its terms on its page on the Hub, then set HF_TOKEN"),
        ({"repo": "made/set", "revision": "gone"}, "has no revision 'gone'. Correct the revision beside source.repo"),
        ({"repo": "made/set", "split": "test"}, "has no Parquet files of the split 'test'. Correct source.split"),
        ({"repo": "lambdalabs/pokemon-blip-captions"}, "It was withdrawn from the Hub in 2024"),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_cure(
    hub: str, tmp_path: Path, source: dict[str, Any], message: str
) -> None:
    result = ingest_apart(tmp_path, hub, source)
    assert result["error"] == "SourceError"
    assert message in result["message"]


def test_a_hub_that_cannot_be_reached_fails_within_ten_seconds_with_what_to_do(tmp_path: Path) -> None:
    """`datasets` retries for 28 s first."""
    with socket.socket() as silent:  # takes the connection and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        result = ingest_apart(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", {"repo": "made/set"})
        wall_s = time.monotonic() - started
    assert wall_s < 10
    assert "made/set cannot be fetched from the Hub" in result["message"]
    assert "The embedded dataset needs no network" in result["message"]
    assert not list(tmp_path.glob("data/.raw/made/*"))


def test_offline_mode_is_named(tmp_path: Path) -> None:
    result = ingest_apart(tmp_path, "", {"repo": "lambdalabs/naruto-blip-captions"}, HF_HUB_OFFLINE="1")
    assert "cannot be fetched because HF_HUB_OFFLINE is set" in result["message"]
