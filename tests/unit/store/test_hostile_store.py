"""A store that somebody else may write: nothing is written, deleted or believed outside of what its owner has.

Over a folder, and over S3 with the marks of the integration tests.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm_assets.artifacts import staging_directory, write_manifest
from mllm_assets.data.curate.register import build_entry
from mllm_assets.data.quality.store import QualityStore, arrow_schema
from mllm_assets.errors import IntegrityError, MllmAssetsError
from mllm_assets.layout import Layout
from mllm_assets.store.mirror import Mirror
from mllm_assets.store.objects import Store

pytestmark = pytest.mark.attack("hostile store")

RUN = "outputs/mine/0123456789abcdef"
MINE = b"mine\n"
S3 = pytest.param("s3", marks=[pytest.mark.integration, pytest.mark.slow])


class Attacker:
    """Writes what they like into a store, past the product."""

    def __init__(self, put: Callable[[str, bytes], None], mirror: Mirror):
        self._put, self.mirror, self.root = put, mirror, mirror.layout.root

    def object(self, data: bytes, digest: str | None = None) -> dict[str, Any]:
        digest = digest or hashlib.sha256(data).hexdigest()
        self._put(f"objects/{digest[:2]}/{digest}", data)
        return {"sha256": digest, "num_bytes": len(data)}

    def write(self, path: str, value: Any) -> None:
        self._put(f"{path}.json", value if isinstance(value, bytes) else json.dumps(value).encode())

    def artifact(self, name: str, files: dict[str, bytes], *, manifest: Any = None, **more: Any) -> None:
        """One whose manifest says the same as the store, unless it is given."""
        listed = {file: self.object(data) for file, data in files.items()}
        text = json.dumps({"files": listed, **more} if manifest is None else manifest).encode()
        described = {**listed, "manifest.json": self.object(text)}
        self.write(f"artifacts/{name}", {"files": described, "read_only": False})


@pytest.fixture(params=["folder", S3])
def attacker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attacker]:
    root = tmp_path / "project"
    for path in ("home/settings", "project/data/dataset_info.json", f"project/{RUN[:-1]}e/weights"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"{}" if path.endswith("json") else MINE)
    if request.param == "folder":

        def put(path: str, data: bytes) -> None:
            (tmp_path / "store" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "store" / path).write_bytes(data)

        yield Attacker(put, Mirror(Store(f"file://{tmp_path}/store", root), Layout(root)))
        return
    for name in ("s3fs", "moto"):
        pytest.importorskip(name, reason=f"the extra with {name} is not installed")
    import boto3
    import fsspec

    from tests.integration.s3_server import BUCKET, s3_server

    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with s3_server(monkeypatch) as server:
        server.make_bucket()
        client = boto3.client("s3", endpoint_url=server.endpoint)
        yield Attacker(
            lambda path, data: client.put_object(Bucket=BUCKET, Key=f"x/{path}", Body=data),
            Mirror(Store(f"s3://{BUCKET}/x", root), Layout(root)),
        )


def files_of(attacker: Attacker) -> dict[str, bytes]:
    """Every file of the machine but the store's, the locks and the database."""
    top = attacker.root.parent
    files = [path for path in top.rglob("*") if path.is_file() and not path.is_relative_to(top / "store")]
    return {str(p.relative_to(top)): p.read_bytes() for p in files if ".lock" not in p.name and "duckdb" not in p.name}


def refused(attacker: Attacker, action: Callable[[], Any], match: str) -> None:
    """The action ends in a message, twice, and no file came, went or changed."""
    before = files_of(attacker)
    for _ in range(2):
        with pytest.raises(MllmAssetsError, match=match):
            action()
    assert files_of(attacker) == before


CLIMBING = [
    "../../../home/settings", "/tmp/absolute", "..", ".", "", "a/../../b", "a//b", "./a", "a/", "a\0b", "a\nb",
    "x" * 300, "x/" * 2000 + "x", "\udc80", 3,
]  # fmt: skip


@pytest.mark.parametrize("name", CLIMBING[:-1], ids=lambda name: ascii(name)[:24])
def test_a_file_of_an_artefact_stays_in_its_folder(attacker: Attacker, name: str) -> None:
    attacker.artifact(RUN, {name: b"owned\n"})
    refused(attacker, lambda: attacker.mirror.pull(attacker.root / RUN), "which is not a plain path below its folder")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"[]", "expected an object, found list"),
        (b"null", "expected an object, found NoneType"),
        (b"3", "expected an object, found int"),
        (b"", "is not JSON|is not satisfiable"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"{}", "has no 'files'"),
        (b'{"files": 3, "read_only": false}', "expected `files` to be an object, found int"),
        (b'{"files": {"a": {}}}', "expected size and sha256 of the file 'a'"),
        (b'{"files": {"a": 3}}', "expected size and sha256 of the file 'a'"),
        (b'{"files": {"a": {"sha256": "../../x", "num_bytes": 1}}}', "expected size and sha256 of the file 'a'"),
        (b'{"files": {"a": {"sha256": "%s", "num_bytes": -1}}}' % (b"a" * 64), "expected size and sha256"),
        (b'{"files": {"a": {"sha256": "%s", "num_bytes": true}}}' % (b"a" * 64), "expected size and sha256"),
        (b'{"files": {}, "read_only": false}', "is not what its own manifest.json says"),
    ],
)
def test_a_manifest_of_the_store_that_is_none_is_named(attacker: Attacker, text: bytes, match: str) -> None:
    attacker.write(f"artifacts/{RUN}", text)
    refused(attacker, lambda: attacker.mirror.pull(attacker.root / RUN), match)


def test_a_file_cannot_be_a_folder_too(attacker: Attacker) -> None:
    attacker.artifact(RUN, {"a": b"1", "a/b/c": b"2"})
    refused(attacker, lambda: attacker.mirror.pull(attacker.root / RUN), "expected size and sha256 of the file 'a/b/c'")


@pytest.mark.parametrize(
    "manifest",
    [[], None, {"files": 3}, {}, {"files": {}}, {"files": {"a": {"sha256": "b" * 64, "num_bytes": 1}}}],
    ids=str,
)
def test_the_store_and_the_artefact_must_say_the_same(attacker: Attacker, manifest: Any) -> None:
    attacker.artifact(RUN, {"a": b"1"}, manifest=[] if manifest is None else manifest)
    refused(
        attacker,
        lambda: attacker.mirror.pull(attacker.root / RUN),
        "expected an object|expected `files`|has no 'files'|is not what its own manifest.json says",
    )


def test_an_object_of_another_size_is_not_downloaded(attacker: Attacker) -> None:
    listed = attacker.object(b"small")
    attacker.object(b"0" * 5_000_000, listed["sha256"])
    manifest = attacker.object(json.dumps({"files": {"a": listed}}).encode())
    attacker.write(f"artifacts/{RUN}", {"files": {"a": listed, "manifest.json": manifest}, "read_only": False})
    refused(attacker, lambda: attacker.mirror.pull(attacker.root / RUN), "is a file of 5000000 bytes in .*of 5:")


def test_a_device_in_a_stores_folder_is_not_read(attacker: Attacker) -> None:
    """`/dev/zero` has a size of 0 and no end."""
    if attacker.mirror.store.url.startswith("s3:"):
        pytest.skip("a bucket holds no devices")
    digest = "a" * 64
    path = attacker.root.parent / "store/objects/aa" / digest
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/zero")
    target = attacker.root / "data/images/aaaaaaaaaaaaaaaa.png"
    refused(attacker, lambda: attacker.mirror.store.fetch_files({target: digest}), "is a other of 0 bytes")


ELSEWHERE = [
    "../home", "/tmp", "data", "data/images", "outputs/mine", RUN, "data/.history", "data/.history/pets",
    "data/.history/others/0123", "data/.history/pets/.hidden", "data/.history/pets/../others/0123", 3, None, [], {},
]  # fmt: skip


@pytest.mark.parametrize("where", ELSEWHERE, ids=str)
def test_a_pointer_points_into_the_folder_of_its_kind(attacker: Attacker, where: Any) -> None:
    """`history/pets` at the folder of runs made the product fetch there, and delete the runs beside it."""
    mirror = attacker.mirror
    text = where if isinstance(where, str) else "x"
    if text and not text.startswith("/") and ".." not in text:
        attacker.artifact(text, {"a": b"1"}, kind="quality_history", dataset="pets")
    for kind, key in (("history", "path"), ("features", "path")):
        attacker.write(f"pointers/{kind}/pets", {key: where})
    attacker.write("pointers/entries/pets/0123", {"version": where, "entries": {}})
    for action in (mirror.pull_history, mirror.pull_features, lambda name: mirror.pull_data(name, "0123")):
        refused(attacker, lambda action=action: action("pets"), r"expected a folder right below|not a plain path")


@pytest.mark.parametrize("said", [[], 3, {}, {"other": 1}, "x"], ids=str)
def test_a_pointer_of_another_shape_is_named(attacker: Attacker, said: Any) -> None:
    mirror = attacker.mirror
    for name in ("history/pets", "features/pets", "entries/pets/0123", "releases/pets/current"):
        attacker.write(f"pointers/{name}", said)
    for action in (
        mirror.pull_history, mirror.pull_features, mirror.follow_current, lambda name: mirror.pull_data(name, "0123")
    ):  # fmt: skip
        refused(attacker, lambda action=action: action("pets"), r"pets.*json: expected an object|pets.*json has no '")


@pytest.mark.parametrize("version", ["..", "current", "v0", "v01", "v1/x", "../../outputs/mine", "", 3], ids=str)
def test_a_release_is_a_version(attacker: Attacker, version: Any) -> None:
    attacker.artifact(f"releases/pets/{version}", {"a": b"1"}, digest="x")
    attacker.write("pointers/releases/pets/current", {"version": version})
    refused(
        attacker,
        lambda: attacker.mirror.follow_current("pets"),
        "which is not a version|not a plain path|expected a folder right below",
    )


def test_a_name_in_a_listing_cannot_climb(attacker: Attacker) -> None:
    """`releases/pets/...json` is the artefact `..` of that folder: all releases of all recipes."""
    attacker.artifact("releases/pets/v1", {"a": b"1"}, digest="x")
    attacker.artifact("releases/pets/..", {"a": b"1"}, digest="x") if attacker.mirror.store.url[0] == "s" else None
    attacker.write("artifacts/releases/pets/..", {"files": {}, "read_only": False})
    attacker.write("pointers/releases/pets/current", {"version": "v1"})
    refused(attacker, lambda: attacker.mirror.follow_current("pets", all_versions=True), "names '..', which is not")


def version_of(attacker: Attacker, images: bytes, dataset: str = "pets") -> tuple[str, dict[str, Any]]:
    """A version whose manifest and digest are in order; returns the digest of its `dataset_info` and its entries."""
    name = f"data/.versions/{dataset}/0123456789abcdef"
    attacker.artifact(name, {"images.sha256": images, "train.json": b"[]"}, digest="0123456789abcdef")
    entries = {f"{dataset}_train": build_entry(f"{dataset}/train.json")}
    files = {name: attacker.object(data) for name, data in {"images.sha256": images, "train.json": b"[]"}.items()}
    text = json.dumps([entries, files], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    attacker.write(f"pointers/entries/{dataset}/{digest}", {"version": name, "entries": entries})
    return digest, entries


@pytest.mark.parametrize(
    "name",
    ["../../home/keys", "/tmp/keys", "dataset_info.json", "images/../x", "images/a/b", "images/.x", "images/", ""],
)
def test_an_image_of_a_version_stays_in_the_folder_of_images(attacker: Attacker, name: str) -> None:
    picture = attacker.object(b"PIC")["sha256"]
    digest, _ = version_of(attacker, f"{picture}  {name}\n".encode())
    refused(attacker, lambda: attacker.mirror.pull_data("pets", digest), "line 1: expected a sha256, two spaces and")
    path = attacker.root / "data/.versions/pets/0123456789abcdef"
    refused(attacker, lambda: attacker.mirror.pull(path), "line 1: expected a sha256, two spaces and")


@pytest.mark.parametrize("line", [b"x  images/a.png", b"no line", b"\xff\xfe", b"%s images/a.png" % (b"a" * 64)])
def test_a_list_of_images_that_is_none_is_named(attacker: Attacker, line: bytes) -> None:
    digest, _ = version_of(attacker, line + b"\n")
    refused(attacker, lambda: attacker.mirror.pull_data("pets", digest), "line 1: expected a sha256, two spaces and")


@pytest.mark.parametrize("name", ["mine.png", "aaaaaaaaaaaaaaaa.png"])
def test_a_picture_of_a_persons_own_is_not_replaced(attacker: Attacker, name: str) -> None:
    mine = attacker.root / "data/images" / name
    mine.parent.mkdir()
    mine.write_bytes(MINE)
    digest, _ = version_of(attacker, f"{attacker.object(b'PIC')['sha256']}  images/{name}\n".encode())
    with pytest.raises(MllmAssetsError, match="exists and is not this dataset's, so it is not replaced"):
        attacker.mirror.pull_data("pets", digest)
    assert mine.read_bytes() == MINE


def test_entries_are_those_that_the_digest_names(attacker: Attacker) -> None:
    """The pointer of one dataset wrote the entry of another."""
    digest, entries = version_of(attacker, b"")
    name = "data/.versions/pets/0123456789abcdef"
    for changed in ({**entries, "others_train": build_entry("others/train.json")}, {"pets_train": {}}, [], None, 3):
        attacker.write(f"pointers/entries/pets/{digest}", {"version": name, "entries": changed})
        refused(attacker, lambda: attacker.mirror.pull_data("pets", digest), "that are not those of this digest")
    attacker.write(f"pointers/entries/pets/{digest}", {"version": name, "entries": entries})
    attacker.mirror.pull_data("pets", digest)
    assert json.loads((attacker.root / "data/dataset_info.json").read_text()) == entries


def test_a_version_that_the_store_lacks_leaves_no_entry_and_no_link(attacker: Attacker) -> None:
    where = "data/.versions/pets/0123456789abcdef"
    attacker.write("pointers/entries/pets/0123", {"version": where, "entries": {}})
    refused(attacker, lambda: attacker.mirror.pull_data("pets", "0123"), "which the store does not hold")
    assert not (attacker.root / "data/pets").is_symlink()


def history(rows: list[dict[str, Any]]) -> bytes:
    schema = arrow_schema("samples")
    table = pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (history([{"dataset": "others", "sample_id": "1"}]), {"kind": "quality_history", "dataset": "pets"}),
        (history([{"dataset": None, "sample_id": "1"}]), {"kind": "quality_history", "dataset": "pets"}),
        (history([{"dataset": "pets", "sample_id": "1"}]), {"kind": "quality_history", "dataset": "others"}),
        (history([{"dataset": "pets", "sample_id": "1"}]), {"kind": "raw", "dataset": "pets"}),
        (history([{"dataset": "pets", "sample_id": "1"}]), {}),
        (b"no parquet", {"kind": "quality_history", "dataset": "pets"}),
        (history([{"dataset": "pets", "sample_id": "1"}])[:-9], {"kind": "quality_history", "dataset": "pets"}),
    ],
)
def test_a_history_holds_its_own_dataset_alone(attacker: Attacker, data: bytes, said: dict[str, str]) -> None:
    path = "data/.history/pets/0123456789abcdef"
    attacker.artifact(path, {"samples.parquet": data}, **said)
    attacker.write("pointers/history/pets", {"path": path})
    refused(attacker, lambda: attacker.mirror.pull_history("pets"), "is not that|has no 'kind'")
    assert QualityStore(attacker.mirror.layout.quality_db).query("FROM samples") == []


def test_deleting_earlier_histories_leaves_what_is_none(attacker: Attacker) -> None:
    folder = attacker.root / "data/.history/pets"
    for name, kind in (("aaaa", "quality_history"), ("bbbb", "notes")):
        (folder / name).mkdir(parents=True)
        write_manifest(folder / name, {"kind": kind})
    (folder / "mine").mkdir()
    path = "data/.history/pets/0123456789abcdef"
    rows = history([{"dataset": "pets", "sample_id": "1"}])
    attacker.artifact(path, {"samples.parquet": rows}, kind="quality_history", dataset="pets")
    attacker.write("pointers/history/pets", {"path": path})
    attacker.mirror.pull_history("pets")
    left = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert left == ["0123456789abcdef", "bbbb", "mine"]


def test_what_lies_in_the_place_of_an_artefact_is_moved_aside_and_not_deleted(attacker: Attacker) -> None:
    place = attacker.root / RUN
    place.mkdir()
    (place / "notes").write_bytes(MINE)
    attacker.artifact(RUN, {"weights": b"1"})
    assert attacker.mirror.pull(place) and (place / "weights").read_bytes() == b"1"
    with staging_directory(place.parent):  # which sweeps what killed processes left
        pass
    assert [path.read_bytes() for path in place.parent.glob(".*.tmp/notes")] == [MINE]


def test_a_run_of_the_store_does_not_replace_what_it_cannot_prove(attacker: Attacker) -> None:
    """An unfinished run holds checkpoints; a damaged one of the store must not cost them."""
    unfinished = attacker.root / RUN
    (unfinished / "checkpoint-5").mkdir(parents=True)
    (unfinished / "checkpoint-5" / "weights").write_bytes(MINE)
    attacker.artifact(RUN, {"model": b"1"}, manifest={"files": {}})
    refused(attacker, lambda: attacker.mirror.pull_runs(unfinished), "is not what its own manifest.json says")


def test_a_directory_outside_of_the_root_is_never_asked_for(attacker: Attacker) -> None:
    for path in (attacker.root / "outputs/../../home", attacker.root.parent / "home", attacker.root):
        with pytest.raises(MllmAssetsError, match="not a plain path below its folder|is outside of"):
            attacker.mirror.store.fetch(path)
    assert isinstance(IntegrityError("x"), MllmAssetsError)
