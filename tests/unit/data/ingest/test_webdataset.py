"""Sources of tars."""

import io
import tarfile

import pytest

from mllm_assets.data.ingest import webdataset
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.layout import Layout
from tests.unit.data.ingest.source_lines import ASK, answers, of_kind, refused, rejects, through, write_tar
from tests.unit.data.made_datasets import encode, made_spec, picture, png

pytestmark = pytest.mark.not_fast


def test_a_sample_of_a_tar_is_found_by_its_key_and_one_too_large_costs_itself(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset, "MAX_SAMPLE_BYTES", 4096)
    for shard in range(2):
        members = [(f"{shard}{n:03}.{kind}", data) for n in range(4) for kind, data in
                   (("png", png(shard * 10 + n) if n else bytes(5000)), ("txt", b"a picture"))]  # fmt: skip
        write_tar(layout.root / "shards" / f"{shard}.tar", members)
    through(of_kind("webdataset", "shards/*.tar"), layout)
    assert [(row["source_location"], row["reason"]) for row in rejects(layout)] == [
        ("0.tar:0000", "image_too_many_bytes"),
        ("1.tar:1000", "image_too_many_bytes"),
    ]


@pytest.mark.attack("tar")
def test_a_sample_of_a_tar_has_a_limit_on_all_its_members_together(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample of five members of 1 GiB, 22 MiB in the file, took 5 GiB."""
    members = [(f"0000.{number}.png", png(number, 64)) for number in range(5)]
    write_tar(layout.root / "a.tar", members)
    for name, limit, kept in (("BYTES", 2 * len(members[0][1]) + 100, 2), ("MEMBERS", 3, 3)):
        with monkeypatch.context() as limited:
            limited.setattr(webdataset, f"MAX_SAMPLE_{name}", limit)
            [row] = webdataset.read_webdataset(of_kind("webdataset", "a.tar").source, layout.root)
        assert row.defect == "image_too_many_bytes"
        assert sum(image is not None for image in row.images) == kept


@pytest.mark.attack("tar")
def test_a_tar_that_expands_without_an_end_or_has_endless_headers_is_refused(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member's long name is read into memory at once, whatever its header says of its length."""
    path = layout.root / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("0000.png")
        member.size = 64 * 2**20
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    monkeypatch.setattr(webdataset, "FREE_BYTES", 2**20)
    monkeypatch.setattr(webdataset, "MAX_EXPANSION", 100)
    assert "it expands to more than" in refused(of_kind("webdataset", "a.tar.gz"), layout)
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        header = tarfile.TarInfo("long")
        header.type, header.size = kind, 2**21
        (layout.root / "b.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2**21) + bytes(1024))
        assert "a header of 2,097,152 bytes" in refused(of_kind("webdataset", "b.tar"), layout)


def test_webdataset_shards(layout: Layout) -> None:
    first = [
        (f"a/{n:04}.{kind}", data)
        for n in range(4)
        for kind, data in (("png", png(n)), ("txt", f" picture {n}\n".encode()))
    ]
    second = [
        ("0004.json", b'{"text": "picture 4"}'), ("0004.jpg", encode(picture(4), "JPEG")),
        ("0005.0.png", png(5)), ("0005.1.png", png(6)), ("0005.txt", b"picture 5"),
        ("0006.png", png(7)), ("0006.txt", b"caf\xe9"),
        ("0007.png", png(8)), ("0007.json", b'{"text": '),
        ("0008.txt", b"no picture"),
        ("0009.png", png(9)),
    ]  # fmt: skip
    write_tar(layout.root / "shards" / "0.tar", first)
    write_tar(layout.root / "shards" / "1.tar", second)
    version, rows = through(of_kind("webdataset", "shards/*.tar"), layout)
    assert version.num_raw == 10
    assert version.reject_reasons == {"caption_empty": 1, "image_missing": 1, "json_unreadable": 1, "txt_unreadable": 1}
    assert answers(rows) == {f"picture {n}" for n in range(6)}
    assert sorted(len(row.images) for row in rows) == [1, 1, 1, 1, 1, 2]


def test_webdataset_classes(layout: Layout) -> None:
    members = [(f"{n}.{kind}", data) for n in range(6) for kind, data in (("cls", b"7"), ("png", png(n)))]
    write_tar(layout.root / "a.tar", members)
    source = SourceSpec(kind="webdataset", path="a.tar", caption_column=None, label_column="label")
    _, rows = through(made_spec(4, 2, source=source, prompts=ASK, answer="{label}"), layout)
    assert answers(rows) == {"7"}


@pytest.mark.attack("tar")
def test_a_damaged_tar_file_is_named_with_its_member(layout: Layout) -> None:
    path = layout.root / "a.tar"
    write_tar(path, [(f"{n}.png", png(n, 512)) for n in range(3)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(png(0, 512)) + 1024 + 1000])
    message = refused(of_kind("webdataset", "a.tar"), layout)
    assert "a.tar cannot be read as a tar file" in message and "1.png" in message
    path.write_bytes(b"this is not a tar file" * 100)
    assert "a.tar cannot be read as a tar file" in refused(of_kind("webdataset", "a.tar"), layout)
