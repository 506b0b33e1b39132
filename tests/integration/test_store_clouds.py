"""The artefact store on Google's and Azure's storage: the real gcsfs and adlfs against servers of this machine.

Azure's, azurite, comes by npm, and is asked where it is installed.
"""

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from mllm_assets.artifacts import find_damage
from mllm_assets.errors import IntegrityError, SourceError
from mllm_assets.store.objects import Sent, Store
from tests.integration.conftest import wait_for
from tests.ports import free_port
from tests.unit.store.test_objects import make_artefact

pytest.importorskip("gcsfs", reason="the extra gs is not installed")
pytest.importorskip("adlfs", reason="the extra abfs is not installed")
pytest.importorskip("gcp_storage_emulator", reason="the extra e2e is not installed")
pytestmark = [pytest.mark.integration, pytest.mark.slow]
BUCKET = "models"
ACCOUNT = "devstoreaccount1"  # of every azurite, as its key is
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class Stores:
    """The same store, as two machines see it."""

    scheme: str
    here: Store
    there: Store


@pytest.fixture(scope="module")
def google() -> Iterator[str]:
    """The address of a server with one bucket."""
    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.WARNING)
    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The connection string of a server with one container."""
    if not (program := shutil.which("azurite-blob")):
        pytest.skip("azurite is not installed: npm install -g azurite")
    from azure.core.exceptions import AzureError
    from azure.storage.blob import BlobServiceClient

    port, folder = free_port(), tmp_path_factory.mktemp("azurite")
    address = f"http://127.0.0.1:{port}/{ACCOUNT}"
    text = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={AZURE_KEY};BlobEndpoint={address};"
    options = ["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--location", str(folder)]
    with subprocess.Popen([program, "--blobPort", str(port), *options], stdout=subprocess.DEVNULL) as process:

        def answers() -> bool:
            try:
                BlobServiceClient.from_connection_string(text, retry_total=0).create_container(BUCKET)
            except AzureError:
                return False
            return True

        try:
            wait_for(answers, "azurite answers")
            yield text
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def own_connections() -> None:
    """Each test has an environment of its own, which the libraries read when they connect."""
    for scheme in ("gs", "abfs"):
        fsspec.get_filesystem_class(scheme).clear_instance_cache()


@pytest.fixture(params=["gs", "abfs"])
def stores(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stores:
    if request.param == "gs":
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("google"))
    else:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", request.getfixturevalue("azure"))
    url = f"{request.param}://{BUCKET}/{tmp_path.name}"
    return Stores(request.param, Store(url, tmp_path / "here"), Store(url, tmp_path / "there"))


def test_an_artefact_goes_through_the_cloud_byte_by_byte_and_only_once(stores: Stores) -> None:
    here, there = stores.here, stores.there
    made, copy = make_artefact(here.root), there.root / "outputs/mine/0123"
    assert not there.fetch(copy) and there.names("outputs/mine") == [] and there.pointer("x/current") is None
    assert here.push(made).num_objects == 3
    assert there.fetch(copy) and find_damage(copy) is None
    assert (copy / "manifest.json").read_bytes() == (made / "manifest.json").read_bytes()
    assert here.push(made) == Sent() and there.names("outputs/mine") == ["outputs/mine/0123"]
    here.point("x/current", {"path": "a"})
    here.point("x/current", {"path": "b"})
    assert there.pointer("x/current") == {"path": "b"}


def test_other_bytes_in_the_cloud_are_refused(stores: Stores) -> None:
    here, there = stores.here, stores.there
    here.push(make_artefact(here.root))
    file_system, base = here._connection
    [name] = file_system.ls(file_system.ls(f"{base}/objects", detail=False)[0], detail=False)
    file_system.pipe_file(name, b"?" * file_system.info(name)["size"])
    with pytest.raises(IntegrityError, match="with other bytes than were sent"):
        there.fetch(there.root / "outputs/mine/0123")
    assert not (there.root / "outputs/mine/0123").exists()


def test_a_bucket_that_is_not_there_is_named(stores: Stores, tmp_path: Path) -> None:
    elsewhere = Store(f"{stores.scheme}://no-such-place/x", tmp_path / "here")
    with pytest.raises(SourceError, match="'no-such-place' of MLLM_ASSETS_STORE=.* does not exist. Create it"):
        elsewhere.push(make_artefact(elsewhere.root))


def test_without_credentials_the_variables_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_", "STORAGE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    for scheme, variable in (("gs", "GOOGLE_APPLICATION_CREDENTIALS"), ("abfs", "AZURE_STORAGE_ACCOUNT_NAME")):
        with pytest.raises(SourceError, match=f"No credentials for {scheme}://.* Set .*{variable}"):
            Store(f"{scheme}://bucket/x", tmp_path).pointer("x")


def test_a_refused_key_is_told_without_being_shown(azure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "d3Jvbmcta2V5LXRoYXQtbm8tc2VydmVyLWtub3dz"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azure.replace(AZURE_KEY, wrong))
    with pytest.raises(
        SourceError, match=r"abfs://models/x refuses this machine .*right to list the container"
    ) as told:
        Store(f"abfs://{BUCKET}/x", tmp_path).pointer("x")
    assert wrong not in str(told.value)
