"""Every kind of source, from its files to rows that a recipe can train on, with counts that add up."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm_assets.data.curate.checks import counts_add_up, every_image_has_a_placeholder
from mllm_assets.data.curate.splits import SplitResult
from mllm_assets.data.ingest import webdataset
from mllm_assets.data.ingest.sources import ingest, read_source
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import MllmAssetsError
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import encode, made_spec, picture, png, run_line, write_source

pytestmark = pytest.mark.not_fast

ASK = ("What is this?",)


def through(spec: DatasetSpec, layout: Layout) -> tuple[SplitResult, list[Row]]:
    """The whole line; the rows are read back as training reads them."""
    *_, version = run_line(spec, layout)
    assert counts_add_up(version).passed
    assert every_image_has_a_placeholder(version.directory, layout.data).passed
    rows = Dataset(layout.data).entry("made_train").rows + Dataset(layout.data).entry("made_val").rows
    assert len(rows) == version.num_train + version.num_val
    return version, rows


def answers(rows: list[Row]) -> set[str]:
    return {row.messages[-1].content for row in rows}


def refused(spec: DatasetSpec, layout: Layout) -> str:
    with pytest.raises(MllmAssetsError) as caught:
        ingest(spec, layout)
    assert [path for path in layout.root.rglob("*") if ".tmp" in path.name] == []
    return str(caught.value)


def of_kind(kind: str, path: str | tuple[str, ...], num_train: int = 4, num_val: int = 2, **fields: Any) -> DatasetSpec:
    return made_spec(num_train, num_val, source=SourceSpec(kind=kind, path=path, **fields), prompts=ASK)


# --- Parquet and Arrow files


def test_several_parquet_files_and_patterns_are_one_dataset(layout: Layout) -> None:
    for number in range(3):
        write_source(
            layout.root / "parts", [(png(n), f"picture {n}") for n in (number, number + 10)], f"{number}.parquet"
        )
    write_source(layout.root, [(png(n), f"picture {n}") for n in (20, 21)], "more.parquet")
    # the pattern names 0.parquet a second time: each file is read once
    spec = of_kind("parquet", ("parts/0.parquet", "parts/*.parquet", "more.parquet"), 6, 2)
    version, rows = through(spec, layout)
    assert version.num_raw == 8
    assert answers(rows) == {f"picture {n}" for n in (0, 1, 2, 10, 11, 12, 20, 21)}


def test_a_pattern_that_matches_nothing_and_a_missing_file_are_named(layout: Layout) -> None:
    write_source(layout.root, [(png(1), "a")])
    assert "source.path 'parts/*.parquet': no file matches" in refused(of_kind("parquet", "parts/*.parquet"), layout)
    spec = of_kind("parquet", ("source.parquet", "gone.parquet"))
    assert "source.path 'gone.parquet': there is no file" in refused(spec, layout)


def test_an_absolute_path_is_the_choice_of_who_wrote_the_yaml(layout: Layout, tmp_path_factory: Any) -> None:
    elsewhere: Path = tmp_path_factory.mktemp("elsewhere")
    write_source(elsewhere, [(png(n), f"picture {n}") for n in range(6)])
    version, _ = through(of_kind("parquet", str(elsewhere / "source.parquet")), layout)
    assert version.num_train + version.num_val == 6


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files_and_the_streams_that_datasets_writes(layout: Layout, stream: bool) -> None:
    features = {"kind": {"_type": "ClassLabel", "names": ["odd_one", "even"]}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("kind", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    columns = {"image": [{"bytes": png(n), "path": None} for n in range(40)], "kind": [n % 2 for n in range(40)]}
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(layout.root / "data-00000.arrow"), schema) as writer:
        writer.write_table(pa.table(columns, schema=schema), max_chunksize=25)
    source = SourceSpec(kind="arrow", path="*.arrow", caption_column=None, label_column="kind")
    version, rows = through(made_spec(30, 10, source=source, prompts=ASK, answer="It is {label}."), layout)
    assert version.num_raw == 40
    assert answers(rows) == {"It is odd one.", "It is even."}
    assert {row.label for row in rows} == {"odd one", "even"}


def test_what_datasets_saves_to_disk_is_read(layout: Layout) -> None:
    """Its own library writes the files here, so that its layout is not what we believe it to be."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(6)], "text": [f"picture {n}" for n in range(6)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(layout.root / "saved")
    _, found = through(of_kind("arrow", "saved/*.arrow"), layout)
    assert answers(found) == set(rows["text"])


def test_a_file_that_is_no_arrow_file_is_named(layout: Layout) -> None:
    (layout.root / "a.arrow").write_bytes(b"no arrow file at all, but long enough to be looked at")
    assert "a.arrow cannot be read as Arrow" in refused(of_kind("arrow", "a.arrow"), layout)


def test_a_text_that_is_not_utf8_is_a_rejected_row(layout: Layout) -> None:
    """Parquet promises UTF-8 in a text column, and no writer but Arrow's own keeps the promise."""
    broken = pa.array([f"picture {n}".encode() for n in range(6)] + [b"caf\xe9"], pa.binary())
    texts = pa.StringArray.from_buffers(7, broken.buffers()[1], broken.buffers()[2])
    pq.write_table(pa.table({"image": [png(n) for n in range(7)], "text": texts}), layout.root / "source.parquet")
    version, rows = through(of_kind("parquet", "source.parquet"), layout)
    assert version.reject_reasons == {"caption_undecodable": 1}
    assert answers(rows) == {f"picture {n}" for n in range(6)}


def test_a_conversation_that_is_not_utf8_is_a_rejected_row(layout: Layout) -> None:
    turns = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"That {n}"}] for n in range(7)]
    table = pa.table({"image": [[png(n)] for n in range(7)], "messages": turns})
    pq.write_table(table, layout.root / "source.parquet", compression="none", use_dictionary=False)
    data = (layout.root / "source.parquet").read_bytes()
    assert data.count(b"That 6") == 1, "the page holds it, and no statistics of the page"
    (layout.root / "source.parquet").write_bytes(data.replace(b"That 6", b"Tha\xff 6"))
    version, rows = through(of_kind("parquet", "source.parquet", messages_column="messages"), layout)
    assert version.reject_reasons == {"messages_undecodable": 1}
    assert answers(rows) == {f"That {n}" for n in range(6)}


# --- folders of images


def picture_folder(layout: Layout, numbers: range = range(6)) -> Path:
    folder = layout.root / "pictures"
    folder.mkdir(exist_ok=True)
    for n in numbers:
        (folder / f"{n}.png").write_bytes(png(n))
    return folder


def test_a_folder_with_metadata(layout: Layout) -> None:
    folder = picture_folder(layout)
    lines = [{"file_name": f"{n}.png", "text": f"picture {n}", "more": {"any": n}} for n in range(6)]
    lines += [{"file_name": "gone.png", "text": "gone"}, {"file_name": "../source.png", "text": "outside"}]
    lines += [{"file_name": "0.png", "text": None}, {"file_name": "1.png", "text": 7}]  # a number is a text
    lines += [{"file_name": name, "text": "no path"} for name in ("a\0.png", "long" * 100, "/etc/passwd")]
    (layout.root / "source.png").write_bytes(png(50))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    version, rows = through(of_kind("image_folder", "pictures", 5), layout)
    assert version.num_raw == 13
    assert version.reject_reasons == {
        "caption_empty": 1,
        "image_missing": 3,
        "image_outside_root": 2,
    }
    assert answers(rows) == {*(f"picture {n}" for n in range(6)), "7"}


@pytest.mark.attack("names")
def test_a_link_out_of_the_folder_is_not_followed(layout: Layout) -> None:
    folder = picture_folder(layout)
    (layout.root / "outside.png").write_bytes(png(50))
    (folder / "link.png").symlink_to(layout.root / "outside.png")
    for n in [*range(6), "link"]:
        (folder / f"{n}.txt").write_text(f"picture {n}")
    version, _ = through(of_kind("image_folder", "pictures"), layout)
    assert version.reject_reasons == {"image_outside_root": 1}


@pytest.mark.attack("names")
def test_a_caption_is_not_read_from_outside_the_folder(layout: Layout) -> None:
    """What a link beside an image shows would be published as its caption."""
    folder = picture_folder(layout, range(7))
    (layout.root / "secret.txt").write_text("secret")
    for n in range(6):
        (folder / f"{n}.txt").write_text(f"picture {n}")
    (folder / "6.txt").symlink_to(layout.root / "secret.txt")
    version, _ = through(of_kind("image_folder", "pictures"), layout)
    assert version.reject_reasons == {"caption_empty": 1}


def test_a_file_too_large_for_any_image_is_not_read(layout: Layout) -> None:
    folder = picture_folder(layout)
    for n in range(7):
        (folder / f"{n}.txt").write_text(f"picture {n}")
    with (folder / "6.png").open("wb") as file:
        file.truncate(2**30 + 1)  # a hole, which takes no room
    version, _ = through(of_kind("image_folder", "pictures"), layout)
    assert version.reject_reasons == {"image_too_many_bytes": 1}


def test_a_folder_with_captions_beside_the_images(layout: Layout) -> None:
    folder = picture_folder(layout, range(8))
    for n in range(6):
        (folder / f"{n}.txt").write_text(f"\ufeffpicture {n}\n", encoding="utf-8")
    (folder / "6.caption").write_text("picture 6")
    (folder / ".hidden.png").write_bytes(png(60))
    version, rows = through(of_kind("image_folder", "pictures", 5, 2), layout)
    assert (version.num_raw, version.reject_reasons) == (8, {"caption_empty": 1})
    assert answers(rows) == {f"picture {n}" for n in range(7)}


def test_a_caption_that_is_not_utf8_costs_its_sample_only(layout: Layout) -> None:
    folder = picture_folder(layout, range(7))
    for n in range(6):
        (folder / f"{n}.txt").write_text(f"picture {n}")
    (folder / "6.txt").write_bytes(b"caf\xe9")
    version, _ = through(of_kind("image_folder", "pictures"), layout)
    assert version.reject_reasons == {"caption_undecodable": 1}


def test_subfolders_are_classes(layout: Layout) -> None:
    for n in range(8):
        path = layout.root / "pictures" / ("old_boats" if n % 2 else "cars") / f"{n}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(n), "JPEG"))
    source = SourceSpec(kind="image_folder", path="pictures", caption_column=None, label_column="label")
    _, rows = through(made_spec(6, 2, source=source, prompts=ASK, answer="It shows {label}."), layout)
    assert answers(rows) == {"It shows old boats.", "It shows cars."}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "metadata.jsonl has no column 'text'; its columns are file_name, caption, kind. Correct image_column, "),
        ({"caption_column": "captoin"}, "has no column 'captoin'; its columns are file_name, caption, kind. Did you "),
        ({"caption_column": "caption", "image_column": "photo"}, "has no column 'photo'; its columns are file_name, "),
        ({"caption_column": "caption", "label_column": "knid"}, "Did you mean 'kind'? Correct image_column, "),
        ({"messages_column": "turns"}, "has no column 'turns'; its columns are file_name, caption, kind. "),
    ],
)
def test_a_column_that_no_row_of_the_metadata_has_is_one_error(
    layout: Layout, columns: dict[str, Any], message: str
) -> None:
    """It was as many rejected samples, each with an empty caption."""
    folder = picture_folder(layout)
    lines = [{"file_name": f"{n}.png", "caption": f"picture {n}"} for n in range(5)]
    lines.append({"file_name": "5.png", "kind": "boat"})  # a row may lack a column
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert message in refused(of_kind("image_folder", "pictures", **columns), layout)
    version, _ = through(of_kind("image_folder", "pictures", caption_column="caption"), layout)
    assert version.reject_reasons == {"caption_empty": 1}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet"])
def test_metadata_may_be_a_table(layout: Layout, name: str) -> None:
    folder = picture_folder(layout)
    if name.endswith(".csv"):
        (folder / name).write_text("file_name,text\n" + "".join(f'{n}.png,"picture, {n}"\n' for n in range(6)))
    else:
        table = {"file_name": [f"{n}.png" for n in range(6)], "text": [f"picture, {n}" for n in range(6)]}
        pq.write_table(pa.table(table), folder / name)
    _, rows = through(of_kind("image_folder", "pictures"), layout)
    assert answers(rows) == {f"picture, {n}" for n in range(6)}


def test_rows_of_several_images_and_whole_conversations(layout: Layout) -> None:
    """One row each: two images; several turns; a system message; placeholders where the writer wants them."""
    folder = picture_folder(layout, range(10))
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    lines = [
        {"file_names": ["0.png", "1.png"], "messages": turns},
        {"file_name": "2.png", "messages": turns + turns},
        {"file_name": "3.png", "messages": [{"role": "system", "content": "Short."}, *turns]},
        {"file_names": ["4.png", "5.png"], "messages": [
            {"from": "human", "value": "First <image>"}, {"from": "gpt", "value": "A."},
            {"from": "human", "value": "Then <image>"}, {"from": "gpt", "value": "B."},
        ]},
        {"file_name": "6.png", "messages": turns[:1]},
        {"file_name": "7.png", "messages": [{"role": "user", "content": "<image><image>"}, turns[1]]},
        {"file_name": "8.png"},
    ]  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = SourceSpec(kind="image_folder", path="pictures", messages_column="messages")
    version, rows = through(made_spec(3, 1, source=source, prompts=(), system="Else."), layout)
    assert version.reject_reasons == {
        "messages_placeholder_count": 1,
        "messages_role_order": 1,
        "messages_unreadable": 1,
    }
    said = {tuple((m.role, m.content) for m in row.messages): len(row.images) for row in rows}
    user, answer = ("user", "What?"), ("assistant", "That.")
    assert said == {
        (("system", "Else."), ("user", "<image><image>What?"), answer): 2,
        (("system", "Else."), ("user", "<image>What?"), answer, user, answer): 1,
        (("system", "Short."), ("user", "<image>What?"), answer): 1,
        (
            ("system", "Else."),
            ("user", "First <image>"),
            ("assistant", "A."),
            ("user", "Then <image>"),
            ("assistant", "B."),
        ): 2,
    }


def test_a_folder_that_is_split_already_stays_so(layout: Layout) -> None:
    for side, numbers in (("train", range(6)), ("validation", range(4, 8))):
        folder = layout.root / "pictures" / side
        folder.mkdir(parents=True)
        for n in numbers:
            (folder / f"{n}.png").write_bytes(png(n))
            (folder / f"{n}.txt").write_text(f"picture {n}")
    version, _ = through(of_kind("image_folder", "pictures", val_split="validation"), layout)
    assert (version.num_train, version.num_val) == (6, 4)
    assert answers(Dataset(layout.data).entry("made_val").rows) == {f"picture {n}" for n in range(4, 8)}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: None, "there is no folder"),
        (lambda folder: folder.mkdir(), "holds no image files (.apng, "),
        (lambda folder: (folder.mkdir(), (folder / "metadata.jsonl").write_text('{"a"}\n\n\x89PNG\n')),
         "metadata.jsonl, line 1, column 5: Expecting ':' delimiter. Correct the JSON there.\n"),
        (lambda folder: (folder.mkdir(), (folder / "metadata.jsonl").write_text('{"picture": "a.png"}\n')),
         "metadata.jsonl, line 1: expected `file_name` with the image's path"),
        (lambda folder: (folder.mkdir(), (folder / "metadata.jsonl").write_text("[1]\n")),
         "metadata.jsonl, row 0: expected an object, got int"),
        (lambda folder: (folder.mkdir(), (folder / "metadata.parquet").write_text("no table")),
         "metadata.parquet cannot be read"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_read_is_named(layout: Layout, write: Callable[[Path], Any], message: str) -> None:
    write(layout.root / "pictures")
    assert message in refused(of_kind("image_folder", "pictures"), layout)


def test_a_bad_line_of_the_metadata_costs_its_row_only(layout: Layout) -> None:
    folder = picture_folder(layout, range(7))
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"picture {n}"}).encode() for n in range(6)]
    lines[2:2] = [b'{"file_name": "6.png", "text": ', b"7", b'{"text": "no file"}', b'{"file_name": "caf\xe9.png"}']
    lines += [b'{"file_name": "0.png", "file_name": "1.png"}', b'{"file_name": "0.png", "text": NaN}']
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    version, rows = through(of_kind("image_folder", "pictures"), layout)
    assert version.reject_reasons == {"caption_empty": 1, "image_unnamed": 1, "row_unreadable": 4}
    assert answers(rows) == {f"picture {n}" for n in range(6)}
    found = {row["source_location"]: row["reason"] for row in rejects(layout)}
    assert found == {
        "metadata.jsonl:3": "row_unreadable",
        "metadata.jsonl:4": "row_unreadable",
        "metadata.jsonl:5": "image_unnamed",
        "metadata.jsonl:6": "row_unreadable",
        "metadata.jsonl:11": "row_unreadable",
        "metadata.jsonl:12": "caption_empty",
    }


def test_where_every_line_is_bad_the_first_ten_are_named(layout: Layout) -> None:
    folder = picture_folder(layout)
    (folder / "metadata.jsonl").write_text('{"picture": "a.png"}\n' * 11 + "{\n" * 20)
    message = refused(of_kind("image_folder", "pictures"), layout)
    lines = message.splitlines()
    assert len(lines) == 11 and lines[-1] == "and 21 more rows."
    for number, line in enumerate(lines[:-1], 1):
        assert f"metadata.jsonl, line {number}: expected `file_name` with the image's path" in line


def test_a_bad_line_of_a_csv_costs_its_row_and_a_row_of_many_lines_begins_at_its_first(layout: Layout) -> None:
    folder = picture_folder(layout, range(8))
    rows = "".join(f'{n}.png,"picture\n{n}"\n' for n in range(5)) + "5.png,caf\xe9\n\n,none\n"
    (folder / "metadata.csv").write_bytes(f"file_name,text\n{rows}6.png,a,comma\n7.png,last".encode("latin-1"))
    version, _ = through(of_kind("image_folder", "pictures"), layout)
    assert version.reject_reasons == {"caption_undecodable": 1, "image_unnamed": 1, "row_unreadable": 1}
    found = {row["source_location"]: row["reason"] for row in rejects(layout)}
    assert found == {
        "metadata.csv:12": "caption_undecodable",
        "metadata.csv:14": "image_unnamed",
        "metadata.csv:15": "row_unreadable",
    }
    places = {row["source_location"] for row in located(layout)}
    assert {f"metadata.csv:{n}" for n in (2, 4, 6, 8, 10, 16)} <= places


@pytest.mark.attack("JSON")
def test_a_conversation_nested_by_the_thousand_costs_its_row_only(layout: Layout) -> None:
    turns = json.dumps([{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That"}])
    table = {"image": [png(n) for n in range(7)], "messages": [*[turns] * 6, "[" * 100_000]}
    pq.write_table(pa.table(table), layout.root / "source.parquet")
    version, _ = through(of_kind("parquet", "source.parquet", messages_column="messages"), layout)
    assert version.reject_reasons == {"messages_unreadable": 1}


# --- where a sample was found


def rejects(layout: Layout) -> list[dict[str, Any]]:
    return QualityStore(layout.quality_db).query("SELECT source_location, reason FROM rejects ORDER BY rank")


def located(layout: Layout) -> list[dict[str, Any]]:
    return QualityStore(layout.quality_db).query("SELECT source_location FROM latest_verdicts ORDER BY row_index")


def test_an_empty_file_is_not_called_a_missing_one(layout: Layout) -> None:
    folder = picture_folder(layout)
    (folder / "empty.png").write_bytes(b"")
    names = [*(f"{n}.png" for n in range(6)), "empty.png", "gone.png"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": n}) + "\n" for n in names))
    through(of_kind("image_folder", "pictures"), layout)
    assert [(row["source_location"], row["reason"]) for row in rejects(layout)] == [
        ("metadata.jsonl:7", "image_empty"),
        ("metadata.jsonl:8", "image_missing"),
    ]


def test_a_sample_of_a_folder_is_found_by_its_file(layout: Layout) -> None:
    folder = picture_folder(layout) / "old boats"
    folder.mkdir()
    (folder / "6.png").write_bytes(png(6)[:300])
    name = b"caf\xe9.png".decode(errors="surrogateescape")  # as Latin-1 wrote it
    (folder / name).write_bytes(b"no picture")
    for n in range(6):
        (folder.parent / f"{n}.txt").write_text(f"picture {n}")
    through(of_kind("image_folder", "pictures"), layout)
    *whole, broken, renamed = [row["source_location"] for row in located(layout)]
    assert whole == [f"{n}.png" for n in range(6)]
    assert broken == "old boats/6.png"
    assert renamed.startswith("old boats/caf\ufffd")


def test_a_file_that_was_renamed_is_found_by_its_new_name(layout: Layout) -> None:
    folder = picture_folder(layout)
    for n in range(6):
        (folder / f"{n}.txt").write_text(f"picture {n}" if n else "")
    spec = of_kind("image_folder", "pictures", 3, 2)
    through(spec, layout)
    assert rejects(layout) == [{"source_location": "0.png", "reason": "caption_empty"}]
    (folder / "0.png").rename(folder / "00.png")
    through(spec, layout)
    assert rejects(layout) == [{"source_location": "00.png", "reason": "caption_empty"}]


def test_a_sample_of_a_table_is_found_by_its_file_and_row(layout: Layout) -> None:
    for name in ("a/0.parquet", "b/1.parquet"):
        rows = [(png(n + len(name)), f"{name} {n}") for n in range(20)]
        write_source((layout.root / name).parent, [*rows, (None, "none")], name[2:])
    through(of_kind("parquet", ("a/*.parquet", "b/1.parquet")), layout)
    assert [row["source_location"] for row in rejects(layout)] == ["a/0.parquet:row 20", "b/1.parquet:row 20"]
    row = next(read_source(SourceSpec(kind="parquet", path="b/1.parquet", image_column="text"), layout.root))
    assert (row.defect, row.detail) == ("image_missing", "b/1.parquet 0")


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


def test_a_row_of_a_llamafactory_directory_is_found_by_its_file(layout: Layout) -> None:
    folder = layout.root / "theirs"
    (folder / "more").mkdir(parents=True)
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]
    for n in range(6):
        (folder / f"{n}.png").write_bytes(png(n))
    rows = [{"conversations": turns, "images": [f"{n}.png"]} for n in range(6)]
    entries = {"t_train": "t.json", "t_val": "more/v.jsonl"}
    (folder / "t.json").write_text(json.dumps([*rows[:4], 7]))
    (folder / "more" / "v.jsonl").write_text("\n".join(map(json.dumps, rows[4:])) + "\n{\n")
    columns = {"messages": "conversations", "images": "images"}
    info = {key: {"file_name": file, "formatting": "sharegpt", "columns": columns} for key, file in entries.items()}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    source = SourceSpec(kind="llamafactory", path="theirs", split="t_train", val_split="t_val")
    through(made_spec(3, 1, source=source, prompts=()), layout)
    assert [row["source_location"] for row in rejects(layout)] == ["t.json:row 4", "more/v.jsonl:3"]


# --- WebDataset


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


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
