"""Sources of kind image_folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.layout import Layout
from tests.unit.data.ingest.source_lines import (
    ASK,
    answers,
    located,
    of_kind,
    picture_folder,
    refused,
    rejects,
    through,
)
from tests.unit.data.made_datasets import encode, made_spec, picture, png

pytestmark = pytest.mark.not_fast


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
