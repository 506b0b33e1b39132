"""`add-dataset` finds out how public data is laid out, and its rows are the source's: texts, order, ids, pictures."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mllm_assets.data.curate.account import Count
from mllm_assets.data.curate.columns import Chosen
from mllm_assets.data.curate.inventory import take_inventory
from mllm_assets.data.curate.layouts import read_layout
from mllm_assets.data.curate.publish import row_messages
from mllm_assets.data.curate.reading import Folder, Options, Reading
from mllm_assets.data.curate.scaffold import as_attributes, as_spec
from mllm_assets.data.curate.variety import digest_of, variety_warnings
from mllm_assets.data.ingest.sources import raw_row, read_source
from mllm_assets.data.sharegpt.delimited import headless_names
from mllm_assets.errors import DataError
from tests.data_layouts import LAYOUTS, Expected, lines, parquet, pictures, put
from tests.unit.data.made_datasets import png


def reading_of(folder: Path, **options: object) -> Reading:
    return read_layout(Folder(found=take_inventory(folder), root=folder.parent, options=Options(**options)))  # type: ignore[arg-type]


def rows_of(folder: Path, reading: Reading) -> list[Expected]:
    spec = as_spec(as_attributes("made", reading))
    found = []
    for row in read_source(spec.source, folder.parent):
        assert row.defect is None, (row.location, row.defect, row.detail)
        turns = row_messages(spec, raw_row(row, Counter()), 0, len(row.images))
        texts = [turn["content"] for turn in turns]
        if spec.prompts and "{" not in spec.prompts[0]:
            texts = texts[1:]  # the prompt is the project's own
        found.append(Expected(pictures=tuple(data or b"" for data in row.images), turns=tuple(texts), id=row.source_id))
    return found


def with_pictures_first(row: Expected) -> Expected:
    """As it is published: pictures that the source does not place come before the first question."""
    turns = list(row.turns)
    if len(turns) > 1 and not any("<image>" in turn for turn in turns):
        first = 1 if len(turns) % 2 else 0
        turns[first] = "<image>" * len(row.pictures) + turns[first]
    return Expected(pictures=row.pictures, turns=tuple(turns), id=row.id)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_its_rows(tmp_path: Path, name: str) -> None:
    """Nine layouts gave the folder's name as every answer, and VQA lost its questions."""
    folder = tmp_path / name
    folder.mkdir()
    expected = [with_pictures_first(row) for row in LAYOUTS[name](folder)]
    assert rows_of(folder, reading_of(folder)) == expected


def undecided(folder: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        reading_of(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("columns", "turns"),
    [
        ({"prefix": "What is it?", "suffix": "a lamp {n}"}, ("<image>What is it?", "a lamp {n}")),
        ({"prompt": "What is {n}?", "response": "a lamp {n}"}, ("<image>What is {n}?", "a lamp {n}")),
        ({"user": "What is {n}?", "assistant": "lamp{n}"}, ("<image>What is {n}?", "lamp{n}")),
        ({"question": "What is {n}?", "sentence": "a lamp {n}"}, ("<image>What is {n}?", "a lamp {n}")),
        ({"ground_truth": '{"total": {n}}'}, ('{"total": {n}}',)),
        ({"transcription": "lamp{n}"}, ("lamp{n}",)),
        ({"en": "a lamp {n}", "source": "web", "width": "64"}, ("a lamp {n}",)),
        ({"TEXT": "a lamp {n}", "label": "x"}, ("a lamp {n}",)),
        ({"blip_caption": "a lamp {n}", "url": "https://a.org/{n}"}, ("a lamp {n}",)),
    ],
)
def test_columns_are_known_by_their_names_and_by_what_is_in_them(
    tmp_path: Path, columns: dict[str, str], turns: tuple[str, ...]
) -> None:
    pictures(tmp_path / "d")
    rows = [{"image": f"{n}.png", **{k: v.replace("{n}", str(n)) for k, v in columns.items()}} for n in range(6)]
    put(tmp_path / "d" / "rows.jsonl", lines(rows))
    found = rows_of(tmp_path / "d", reading_of(tmp_path / "d"))
    assert [row.turns for row in found] == [tuple(t.replace("{n}", str(n)) for t in turns) for n in range(6)]


def test_what_several_columns_fit_is_asked_for_and_taken(tmp_path: Path) -> None:
    pictures(tmp_path / "d")
    rows = [{"image": f"{n}.png", "caption": f"one {n}", "description": f"two {n}"} for n in range(6)]
    put(tmp_path / "d" / "rows.jsonl", lines(rows))
    message = undecided(tmp_path / "d")
    assert "caption and description could each be the answer. Choose with --answer COLUMN" in message
    assert "Its columns: image, caption, description" in message
    reading = reading_of(tmp_path / "d", chosen=Chosen(answer="description"))
    assert [row.turns for row in rows_of(tmp_path / "d", reading)] == [(f"two {n}",) for n in range(6)]
    assert "--label names 'gone', which no row has" in undecided(tmp_path / "d", chosen=Chosen(label="gone"))


def test_several_files_that_differ_are_asked_for(tmp_path: Path) -> None:
    pictures(tmp_path / "d")
    put(tmp_path / "d" / "a.jsonl", lines({"image": f"{n}.png", "caption": f"a {n}"} for n in range(6)))
    put(tmp_path / "d" / "b.jsonl", lines({"image": f"{n}.png", "question": f"{n}?", "answer": "b"} for n in range(6)))
    message = undecided(tmp_path / "d")
    assert (
        "--file a.jsonl: json lines: a.jsonl; images image, answer caption" in message and "--file b.jsonl" in message
    )
    assert rows_of(tmp_path / "d", reading_of(tmp_path / "d", file="a.jsonl"))[2].turns == ("a 2",)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"image": "0.png", "boxes": [1, 2]}], "none of its columns is a caption, an answer or a class"),
        ([{"image": "gone.png", "caption": "x y"}], "no picture was found for the column image: 'gone.png'"),
        ([{"url": "https://a.org/0.png", "caption": "x y"}], "addresses on the web, which are not downloaded"),
        (
            [{"image": "0.png", "question": "?", "choices": ["a", "b"], "answer": 1}],
            "whether they count from 1",
        ),
        ([{"image": "0.png", "chosen": "a", "rejected": "b"}], "preference training"),
        (
            [{"image": f"{n}.png", "caption": f"a lamp left of {n}", "label": n} for n in range(2)],
            "Choose with --answer caption, or --label label to learn the number",
        ),
    ],
)
def test_an_annotation_file_that_cannot_be_used_is_an_error_with_its_columns(
    tmp_path: Path, rows: list[dict[str, object]], said: str
) -> None:
    """The folder's name was learnt as the class of every picture."""
    pictures(tmp_path / "d" / "photos")
    pictures(tmp_path / "d" / "more", "m{n}.png")
    put(tmp_path / "d" / "rows.jsonl", lines(rows))
    message = undecided(tmp_path / "d")
    assert said in message and f"Its columns: {', '.join(rows[0])}" in message


def test_one_folder_of_pictures_is_no_class(tmp_path: Path) -> None:
    pictures(tmp_path / "d" / "photos")
    assert "none of its 6 images has a caption or a class" in undecided(tmp_path / "d")


def test_what_has_to_be_unpacked_is_named(tmp_path: Path) -> None:
    pictures(tmp_path / "d")
    put(tmp_path / "d" / "train.jsonl.gz", b"\x1f\x8b")
    assert "Not used: train.jsonl.gz (a compressed file: unpack it)." in undecided(tmp_path / "d")
    put(tmp_path / "e" / "captions.csv", "file,caption\n0.png,a lamp\n1.png,a kite\n")
    put(tmp_path / "e" / "train.zip", b"PK")
    assert "\ntrain.zip: a ZIP archive: unpack it." in undecided(tmp_path / "e")


def test_a_name_in_two_folders_is_ambiguous_and_not_the_first(tmp_path: Path) -> None:
    """A test picture of the same name would have got the text of a training picture."""
    for part in ("a", "b"):
        pictures(tmp_path / "d" / part)
    put(tmp_path / "d" / "rows.jsonl", lines({"image": f"{n}.png", "caption": f"x {n}"} for n in range(6)))
    source = {"kind": "table", "path": "d/rows.jsonl", "media_dir": ["d/a", "d/b"], "caption_column": "caption"}
    rows = list(read_source(as_spec({"name": "made", "source": source, "prompts": ["?"]}).source, tmp_path))
    assert {(row.defect, row.detail) for row in rows} == {("image_ambiguous", f"{n}.png") for n in range(6)}


@pytest.mark.parametrize("others", [["masks"], ["thumbs/a", "thumbs/b", "masks"]])
def test_a_name_that_is_in_several_folders_is_asked_for(tmp_path: Path, others: list[str]) -> None:
    """`masks/`, last by name, was learnt in place of the pictures, and one `image.png` for all rows."""
    for part in ("images", *others):
        pictures(tmp_path / "d" / part)
    put(tmp_path / "d" / "rows.jsonl", lines({"image": f"{n}.png", "caption": f"x {n}"} for n in range(6)))
    message = undecided(tmp_path / "d")
    assert f"'0.png' is the name of a picture in each of images, {', '.join(sorted(others))}." in message
    assert "Choose with --media-dir FOLDER" in message
    chosen = reading_of(tmp_path / "d", media_dir=(tmp_path / "d" / "images",))
    assert chosen.source["media_dir"] == "d/images"


def test_of_folders_with_the_same_names_a_table_means_that_of_its_split(tmp_path: Path) -> None:
    for part in ("test", "train"):
        pictures(tmp_path / "d" / part)
    put(tmp_path / "d" / "train.csv", "id,label\n" + "".join(f"{n},{'ab'[n % 2]}\n" for n in range(6)))
    assert reading_of(tmp_path / "d").source["media_dir"] == "d/train"
    put(tmp_path / "d" / "train" / "rows.csv", "image,label\n" + "".join(f"{n}.png,{'ab'[n % 2]}\n" for n in range(6)))
    assert "media_dir" not in reading_of(tmp_path / "d", file="train/rows.csv").source


@pytest.mark.attack("names")
def test_a_path_out_of_the_folders_is_not_read_unless_the_yaml_names_it(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "0.png", png(0))
    outside = str(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "link.png").symlink_to(outside)
    for name in (outside, "link.png", "../elsewhere/0.png"):
        parquet(tmp_path / "d" / "a.parquet", image=[name] * 2, caption=["x y", "z"])
        spec = {"kind": "table", "path": "d/a.parquet", "caption_column": "caption"}
        attributes = {"name": "made", "source": spec, "prompts": ["?"]}
        [row, _] = read_source(as_spec(attributes).source, tmp_path)
        assert (row.images, row.defect, row.detail) == ((None,), "image_outside_root", name)
        attributes["source"] = {**spec, "media_dir": [str(tmp_path / "elsewhere"), "d"]}
        [row, _] = read_source(as_spec(attributes).source, tmp_path)
        assert row.images == (png(0),)


def test_a_template_names_any_column_and_an_unknown_one_is_an_error(tmp_path: Path) -> None:
    """`{question}` was trained on literally."""
    pictures(tmp_path)
    put(tmp_path / "a.jsonl", lines({"image": f"{n}.png", "place": f"a {n}", "year": 1900 + n} for n in range(6)))
    source = {"kind": "table", "path": "a.jsonl"}
    attributes = {"name": "made", "source": source, "prompts": ["Where in {year}?"], "answer": "In {place}."}
    spec = as_spec(attributes)
    row = list(read_source(spec.source, tmp_path))[1]
    assert dict(row.fields) == {"place": "a 1", "year": "1901"}
    with pytest.raises(
        DataError, match="has no column 'plaec'; its columns are image, place, year. Did you mean 'place'"
    ):
        list(read_source(as_spec({**attributes, "answer": "In {plaec}."}).source, tmp_path))


@pytest.mark.parametrize("line", ["{n}.png,a lamp {n}", "{n}.png#0\ta lamp {n}"])
def test_a_table_without_a_line_of_names_keeps_its_first_row(tmp_path: Path, line: str) -> None:
    """Its first row became the names of the columns, and was lost."""
    pictures(tmp_path / "d" / "images")
    put(tmp_path / "d" / "rows.txt", "".join(line.replace("{n}", str(n)) + "\n" for n in range(6)))
    found = rows_of(tmp_path / "d", reading_of(tmp_path / "d"))
    assert [(row.pictures, row.turns) for row in found] == [((png(n),), (f"a lamp {n}",)) for n in range(6)]


def test_what_looks_like_an_answer_and_is_none_is_refused(tmp_path: Path) -> None:
    """Boxes of a detector, a question without a known answer, a table whose commas are not quoted."""
    pictures(tmp_path / "boxes")
    for n in range(6):
        put(tmp_path / "boxes" / f"{n}.txt", "0 0.5 0.5 0.1 0.1\n1 0.2 0.25 .5 1\n")
    assert "hold a class's number and the corners of a box" in undecided(tmp_path / "boxes")
    pictures(tmp_path / "asked")
    put(tmp_path / "asked" / "a.jsonl", lines({"image": f"{n}.png", "question": f"What is {n}?"} for n in range(6)))
    assert "question is a question, and no column is known to be its answer" in undecided(tmp_path / "asked")
    pictures(tmp_path / "commas")
    put(tmp_path / "commas" / "a.csv", "image,caption\n" + "".join(f"{n}.png,a lamp, a {n}\n" for n in range(6)))
    assert "line 2: more values than columns. Quote what has a comma in it" in undecided(tmp_path / "commas")


def test_rows_that_all_say_the_same_are_a_warning() -> None:
    def said(*texts: str) -> Counter[bytes]:
        return Counter(map(digest_of, texts))

    assert variety_warnings(said("a", "b", "c", "a"), said("?", "!")) == (
        "half of the answers are equal (2 of 4): a model learns to say it without looking",
    )
    equal, asked = variety_warnings(said("a", "a"), said("?", "?"))
    assert equal.startswith("all 2 answers are equal") and asked.startswith("no two rows ask a question of their own")
    assert variety_warnings(said("a", "b", "c"), said()) == ()


def test_files_of_several_splits_that_are_read_as_one_are_a_warning(tmp_path: Path) -> None:
    """Test rows were trained on without a word."""
    parquet(tmp_path / "d" / "train-0.parquet", image=[png(1)], caption=["a lamp"])
    parquet(tmp_path / "d" / "test-0.parquet", image=[png(2)], caption=["a kite"])
    inventory, reading = take_inventory(tmp_path / "d"), reading_of(tmp_path / "d")
    mixed = replace(reading, source={name: reading.source[name] for name in ("kind", "path")})
    [warning] = Count(inventory=inventory, reading=mixed).warnings()
    assert warning.startswith("files of test and train are read as one and split again")
    given = replace(mixed, source={**mixed.source, "val_split": "test"})
    assert Count(inventory=inventory, reading=given).warnings() == ()


def test_a_first_line_of_a_number_and_a_sentence_is_a_row_and_no_names_of_columns() -> None:
    """The first row of `00000<tab>A boat.` became the columns, and its picture had no row."""
    assert headless_names(["00000", "A boat at a pier."]) == ["image", "text"]
    assert [headless_names(cells) for cells in (["0", "1"], ["2019", "2020"], ["id", "the caption"])] == [None] * 3
