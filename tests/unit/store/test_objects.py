"""What goes into the store comes out of it, wholly or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_assets.artifacts import find_damage, is_complete, read_manifest, write_manifest
from mllm_assets.errors import IntegrityError, SourceError
from mllm_assets.operations.machine import check_store
from mllm_assets.store.objects import Sent, Store


def make_artefact(root: Path, name: str = "outputs/mine/0123", text: str = "weights") -> Path:
    directory = root / name
    (directory / "model").mkdir(parents=True)
    (directory / "model" / "weights").write_text(text)
    (directory / "loss.png").write_text("plot")
    write_manifest(directory, {"kind": "test"})
    return directory


@pytest.fixture
def here(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/store", tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/store", tmp_path / "there")


def objects(store: Store) -> list[Path]:
    return sorted(path for path in (store.root.parent / "store" / "objects").rglob("*") if path.is_file())


def test_an_artefact_comes_to_another_root_byte_by_byte(here: Store, there: Store) -> None:
    made = make_artefact(here.root)
    assert here.push(made).num_objects == 3
    copy = there.root / "outputs/mine/0123"
    assert not there.fetch(there.root / "outputs/mine/other") and there.fetch(copy)
    assert find_damage(copy) is None
    assert (copy / "manifest.json").read_bytes() == (made / "manifest.json").read_bytes()
    assert not list(copy.parent.glob(".*")), "nothing of the download stays"


def test_content_is_sent_once_whatever_names_it(here: Store) -> None:
    here.push(make_artefact(here.root))
    release = make_artefact(here.root, "releases/mine/v1")
    assert here.push(release) == Sent(), "weights, plot and manifest are there"
    assert len(objects(here)) == 3


def test_a_half_upload_is_seen_by_nobody_and_the_next_one_sends_the_rest(here: Store, there: Store) -> None:
    made = make_artefact(here.root)
    weights = made / "model" / "weights"
    weights.chmod(0o644)
    good = weights.read_bytes()
    weights.write_bytes(b"changed")
    with pytest.raises(IntegrityError, match=r"model/weights does not match its digest, so it is not mirrored"):
        here.push(made)
    assert not there.fetch(there.root / "outputs/mine/0123") and there.names("outputs/mine") == []
    weights.write_bytes(good)
    here.push(made)
    assert there.fetch(there.root / "outputs/mine/0123")


def test_what_was_sent_before_is_not_sent_again(here: Store) -> None:
    made = make_artefact(here.root)
    digests = {entry["sha256"]: made / name for name, entry in read_manifest(made)["files"].items()}
    assert here.push_files(digests).num_objects == 2
    assert here.push(made).num_objects == 1


def test_an_object_that_a_killed_upload_cut_short_is_sent_again(here: Store) -> None:
    made = make_artefact(here.root)
    here.push(made)
    [weights] = [path for path in objects(here) if path.read_text() == "weights"]
    weights.write_text("wei")
    (here.root.parent / "store" / "artifacts" / "outputs/mine/0123.json").unlink()
    assert here.push(made).num_objects == 1 and weights.read_text() == "weights"


def test_what_comes_damaged_is_refused_and_leaves_nothing(here: Store, there: Store) -> None:
    here.push(make_artefact(here.root))
    [weights] = [path for path in objects(here) if path.read_text() == "weights"]
    weights.write_text("rotten!")
    copy = there.root / "outputs/mine/0123"
    with pytest.raises(
        IntegrityError, match=rf"with other bytes than were sent: objects/.*{weights.name} is damaged. Del"
    ):
        there.fetch(copy)
    assert not copy.exists() and not list(copy.parent.glob(".*"))
    weights.unlink()
    with pytest.raises(SourceError, match="weights is not in file://.* Materialise its asset again where it was made"):
        there.fetch(copy)


def test_an_artefact_of_the_store_is_never_replaced(here: Store, there: Store) -> None:
    here.push(make_artefact(here.root, "releases/mine/v1"))
    other = make_artefact(there.root, "releases/mine/v1", text="others")
    with pytest.raises(IntegrityError, match="holds another releases/mine/v1 than this machine"):
        there.push(other)


def test_what_is_read_only_stays_so(here: Store, there: Store) -> None:
    made = make_artefact(here.root)
    for path in made.rglob("*"):
        if path.is_file():
            path.chmod(0o444)
    here.push(made)
    copy = there.root / "outputs/mine/0123"
    there.fetch(copy)
    assert {path.stat().st_mode & 0o222 for path in copy.rglob("*") if path.is_file()} == {0}


def test_pointers_change_and_are_seen_at_once(here: Store, there: Store) -> None:
    assert there.pointer("releases/mine/current") is None
    here.point("releases/mine/current", {"path": "releases/mine/v1"})
    assert there.pointer("releases/mine/current") == {"path": "releases/mine/v1"}
    here.point("releases/mine/current", {"path": "releases/mine/v2"})
    assert there.pointer("releases/mine/current") == {"path": "releases/mine/v2"}


def test_names_lists_the_artefacts_of_a_folder(here: Store, there: Store) -> None:
    here.push(make_artefact(here.root, "releases/mine/v1"))
    here.push(make_artefact(here.root, "releases/mine/v2"))
    assert there.names("releases/mine") == ["releases/mine/v1", "releases/mine/v2"] and there.names("releases/no") == []


def test_a_torn_manifest_of_the_store_is_named(here: Store, there: Store) -> None:
    here.push(make_artefact(here.root))
    (here.root.parent / "store" / "artifacts" / "outputs/mine/0123.json").write_text('{"files": ')
    with pytest.raises(IntegrityError, match=r"artifacts/outputs/mine/0123.json is not JSON. Delete it"):
        there.fetch(there.root / "outputs/mine/0123")


def test_a_path_outside_of_the_root_is_refused(here: Store, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is outside of .* Set a relative output_dir"):
        here.push(make_artefact(tmp_path / "elsewhere"))


@pytest.mark.parametrize("url", ["az://bucket/x", "/folder", "s3://", "file://", "https://user:secret@host/x"])
def test_an_address_that_is_no_store_is_refused_without_its_secrets(url: str, tmp_path: Path) -> None:
    places = "s3://bucket/prefix, gs://bucket/prefix, abfs://container/prefix, or to file:///folder"
    with pytest.raises(SourceError, match=f"is not a store. Set it to {places}") as caught:
        Store(url, tmp_path).pointer("x")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "gs://bucket/x?secret=1"])
def test_keys_in_the_address_are_refused_without_being_shown(url: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="keys belong in the environment") as caught:
        Store(url, tmp_path).pointer("x")
    assert "secret=" not in str(caught.value) and "key:secret" not in str(caught.value)


@pytest.mark.parametrize(("package", "extra"), [("s3fs", "s3"), ("gcsfs", "gs"), ("adlfs", "abfs")])
def test_without_its_package_the_extra_is_named(package: str, extra: str) -> None:
    code = (
        f"import os, sys; sys.modules['{package}'] = None; os.environ['AZURE_STORAGE_ACCOUNT_NAME'] = 'mine'\n"
        "from pathlib import Path; from mllm_assets.store.objects import Store\n"
        "from mllm_assets.errors import SourceError\n"
        f"try: Store('{extra}://bucket/x', Path('.')).pointer('x')\n"
        "except SourceError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"pip install 'mllm-assets[{extra}]'" in result.stdout, result.stderr


def test_a_full_disk_of_the_store_is_told_and_the_local_artefact_stays(here: Store) -> None:
    made = make_artefact(here.root)
    store = here.root.parent / "store"
    store.write_text("a file where the folder should be")
    with pytest.raises(SourceError, match="cannot be reached, or the connection broke .*What was made here is kept"):
        here.push(made)
    assert is_complete(made) and find_damage(made) is None
    store.unlink()
    assert here.push(made).num_objects == 3
    assert json.loads((store / "artifacts/outputs/mine/0123.json").read_text())["read_only"] is False


def test_doctor_says_whether_the_store_answers(tmp_path: Path) -> None:
    assert check_store("", tmp_path) == []
    [good] = check_store(f"file://{tmp_path}", tmp_path)
    [bad] = check_store("az://bucket/x", tmp_path)
    assert good.status == "ok" and bad.status == "fail"
    assert bad.next_step.startswith("Set it to s3://bucket/prefix")
