"""The artefact store on S3: the real s3fs against moto's server."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mllm_assets.artifacts import find_damage
from mllm_assets.errors import SourceError
from mllm_assets.store.objects import Sent, Store
from tests.integration.s3_server import BUCKET, S3Server, s3_server
from tests.ports import free_port
from tests.unit.store.test_objects import make_artefact

pytest.importorskip("s3fs", reason="the extra s3 is not installed")
pytest.importorskip("moto", reason="the extra e2e is not installed")
pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()  # each test has a server of its own
    with s3_server(monkeypatch) as server:
        yield server


def stores(tmp_path: Path) -> tuple[Store, Store]:
    url = f"s3://{BUCKET}/some/prefix"
    return Store(url, tmp_path / "here"), Store(url, tmp_path / "there")


def test_an_artefact_goes_through_s3_byte_by_byte_and_only_once(s3: S3Server, tmp_path: Path) -> None:
    s3.make_bucket()
    here, there = stores(tmp_path)
    made, copy = make_artefact(here.root), there.root / "outputs/mine/0123"
    assert not there.fetch(copy) and there.names("outputs/mine") == []
    assert here.push(made).num_objects == 3
    assert there.fetch(copy) and find_damage(copy) is None
    assert (copy / "manifest.json").read_bytes() == (made / "manifest.json").read_bytes()
    assert here.push(made) == Sent() and there.names("outputs/mine") == ["outputs/mine/0123"]
    here.point("x/current", {"path": "a"})
    here.point("x/current", {"path": "b"})
    assert there.pointer("x/current") == {"path": "b"}


def test_the_manifest_is_the_last_object_that_is_sent(s3: S3Server, tmp_path: Path) -> None:
    s3.make_bucket()
    here, _ = stores(tmp_path)
    here.push(make_artefact(here.root))
    puts = [request for request in s3.requests if request.startswith("PUT") and "/some/" in request]
    assert len(puts) == 4 and puts[-1].endswith("/artifacts/outputs/mine/0123.json")


def test_a_server_that_is_busy_for_a_moment_is_asked_again(s3: S3Server, tmp_path: Path) -> None:
    s3.make_bucket()
    here, _ = stores(tmp_path)
    made = make_artefact(here.root)
    s3.num_busy = 2
    assert here.push(made).num_objects == 3 and s3.num_busy == 0


def test_a_server_that_stays_busy_ends_in_a_message_after_bounded_attempts(s3: S3Server, tmp_path: Path) -> None:
    s3.make_bucket()
    here, _ = stores(tmp_path)
    made = make_artefact(here.root)
    s3.requests.clear()
    s3.num_busy = 10_000
    with pytest.raises(SourceError, match="cannot be reached, or the connection broke .*What was made here is kept"):
        here.push(made)
    assert len(s3.requests) <= 20 and find_damage(made) is None


def test_a_bucket_that_is_not_there_is_named(s3: S3Server, tmp_path: Path) -> None:
    here, there = stores(tmp_path)
    with pytest.raises(SourceError, match=f"The bucket '{BUCKET}' of .* does not exist. Create it, or correct"):
        here.push(make_artefact(here.root))
    with pytest.raises(SourceError, match=f"The bucket '{BUCKET}' of "):
        there.fetch(there.root / "outputs/mine/0123")


def test_no_credentials_is_told(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SourceError, match="No credentials for s3://.* Set AWS_ACCESS_KEY_ID"):
        stores(tmp_path)[0].pointer("x")


def test_a_network_that_is_gone_is_told_soon_and_shows_no_secret(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    started_s = time.monotonic()
    with pytest.raises(SourceError, match="cannot be reached, or the connection broke .*Check the network") as caught:
        stores(tmp_path)[0].pointer("x")
    assert time.monotonic() - started_s < 30
    assert "planted" not in str(caught.value) and caught.value.__cause__ is None


def test_a_right_that_is_missing_is_told(s3: S3Server, tmp_path: Path) -> None:
    s3.make_bucket()
    s3.forbidden = ("GET", "HEAD")
    here, _ = stores(tmp_path)
    with pytest.raises(SourceError, match=r"refuses this machine .*right to list the bucket"):
        here.push(make_artefact(here.root))
