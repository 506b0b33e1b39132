"""Small copies of the layouts that public image-text data has, each with the rows that it should give."""

import base64
import csv
import io
import json
import tarfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.unit.data.made_datasets import png

NUM_ROWS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """A row: its pictures' bytes, its turns as (role, text) without `<image>` where it is put first, its own id."""

    pictures: tuple[bytes, ...]
    turns: tuple[str, ...]
    id: str | None = None


Layout = Callable[[Path], list[Expected]]
LAYOUTS: dict[str, Layout] = {}


def layout(write: Layout) -> Layout:
    LAYOUTS[write.__name__] = write
    return write


def said(n: int) -> str:
    return f"A lamp, a kite and {n} stones"


def put(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def lines(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def captioned(ids: Sequence[str] | None = None) -> list[Expected]:
    return [Expected(pictures=(png(n),), turns=(said(n),), id=ids[n] if ids else None) for n in range(NUM_ROWS)]


def asked(question: str = "How many stones in {n}?", answer: str = "{n} stones", **fields: Any) -> list[Expected]:
    return [
        Expected(pictures=(png(n),), turns=(question.format(n=n), answer.format(n=n)), **fields)
        for n in range(NUM_ROWS)
    ]


def pictures(folder: Path, name: str = "{n}.png") -> None:
    for n in range(NUM_ROWS):
        put(folder / name.format(n=n), png(n))


def parquet(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_csv(path: Path, rows: Sequence[Sequence[Any]], **options: Any) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, **options).writerows(rows)
    put(path, buffer.getvalue())


@layout
def llava_with_rows_of_text(folder: Path) -> list[Expected]:
    rows = [
        {"id": f"{n:06}", "image": f"coco/train2017/{n}.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": said(n)},
            {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]}
        for n in range(NUM_ROWS)
    ]  # fmt: skip
    talk = [{"from": "human", "value": "Say hello."}, {"from": "gpt", "value": "Hello."}]
    pictures(folder / "coco" / "train2017")
    put(folder / "mix.json", json.dumps([*rows, {"id": "text", "conversations": talk}]))
    found = [Expected(pictures=(png(n),), turns=("<image>\nWhat?", said(n), "Sure?", "Yes."), id=f"{n:06}")
             for n in range(NUM_ROWS)]  # fmt: skip
    return [*found, Expected(pictures=(), turns=("Say hello.", "Hello."), id="text")]


@layout
def coco_captions(folder: Path) -> list[Expected]:
    for side, first in (("train", 0), ("val", 4)):
        numbers = range(first, first + (4 if side == "train" else 2))
        for n in numbers:
            put(folder / f"{side}2017" / f"{n:012}.png", png(n))
        images = [{"id": n, "file_name": f"{n:012}.png"} for n in numbers]
        texts = [{"id": 10 * n + k, "image_id": n, "caption": f"{said(n)}, {k}"} for n in numbers for k in range(2)]
        boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [0, 0, 1, 1]} for n in numbers]
        for kind, annotations in (("captions", texts), ("instances", boxes)):
            put(folder / "annotations" / f"{kind}_{side}2017.json",
                json.dumps({"info": {}, "images": images, "annotations": annotations}))  # fmt: skip
    return [Expected(pictures=(png(n),), turns=(f"{said(n)}, {k}",), id=str(10 * n + k))
            for n in range(NUM_ROWS) for k in range(2)]  # fmt: skip


@layout
def vqa_with_questions_in_a_file_of_their_own(folder: Path) -> list[Expected]:
    for n in range(NUM_ROWS):
        put(folder / "train2014" / f"COCO_train2014_{n:012}.png", png(n))
    questions = [
        {"image_id": n, "question": f"How many stones in {n}?", "question_id": 10 * n} for n in range(NUM_ROWS)
    ]
    annotations = [
        {"question_id": 10 * n, "image_id": n, "multiple_choice_answer": f"{n} stones",
         "answers": [{"answer": "none", "answer_id": 1}]}
        for n in range(NUM_ROWS)
    ]  # fmt: skip
    put(folder / "questions.json", json.dumps({"info": {}, "questions": questions}))
    put(folder / "annotations.json", json.dumps({"info": {}, "annotations": annotations}))
    return [Expected(pictures=row.pictures, turns=row.turns, id=str(10 * n)) for n, row in enumerate(asked())]


@layout
def a_csv_beside_a_folder_of_images(folder: Path) -> list[Expected]:
    pictures(folder / "images")
    write_csv(folder / "captions.csv", [["image", "caption"], *([f"images/{n}.png", said(n)] for n in range(NUM_ROWS))])
    return captioned()


@layout
def flickr_with_a_bar(folder: Path) -> list[Expected]:
    pictures(folder / "flickr30k_images")
    rows = (f"{n}.png| {k}| {said(n)} {k}\n" for n in range(NUM_ROWS) for k in range(2))
    put(folder / "results.csv", "image_name| comment_number| comment\n" + "".join(rows))
    return [Expected(pictures=(png(n),), turns=(f" {said(n)} {k}",)) for n in range(NUM_ROWS) for k in range(2)]


@layout
def karpathys_split_with_sentences(folder: Path) -> list[Expected]:
    pictures(folder / "images")
    images = [{"filename": f"{n}.png", "imgid": n, "sentences": [{"raw": said(n)}, {"raw": "Again."}], "split": "train"}
              for n in range(NUM_ROWS)]  # fmt: skip
    put(folder / "dataset_flickr8k.json", json.dumps({"images": images, "dataset": "flickr8k"}))
    return [Expected(pictures=(png(n),), turns=(text,)) for n in range(NUM_ROWS) for text in (said(n), "Again.")]


@layout
def a_table_of_semicolons_with_a_mark_and_names_of_windows(folder: Path) -> list[Expected]:
    for n in range(NUM_ROWS):
        put(folder / "fotos" / unicodedata.normalize("NFD", f"über {n}.png"), png(n))
    rows = "".join(f"fotos\\über {n}.png;{said(n)}\r\n" for n in range(NUM_ROWS))
    put(folder / "texte.csv", "\ufefffile;description\r\n" + rows)
    return captioned()


@layout
def tsv_of_utf_16(folder: Path) -> list[Expected]:
    pictures(folder)
    rows = "image\tcaption\r\n" + "".join(f"{n}.png\t{said(n)}\r\n" for n in range(NUM_ROWS))
    put(folder / "captions.txt", rows.encode("utf-16"))
    return captioned()


@layout
def vqa_in_parquet(folder: Path) -> list[Expected]:
    cells = [{"bytes": png(n), "path": f"{n}.png"} for n in range(NUM_ROWS)]
    parquet(folder / "data" / "train-00000-of-00001.parquet", image=cells,
            question=[f"How many stones in {n}?" for n in range(NUM_ROWS)],
            answer=[f"{n} stones" for n in range(NUM_ROWS)])  # fmt: skip
    put(folder / "README.md", "# Data")
    return asked()


@layout
def answers_of_ten_people_under_data(folder: Path) -> list[Expected]:
    pictures(folder / "train_images", "a{n}.png")
    rows = [{"question": f"How many stones in {n}?", "image_id": f"a{n}", "question_id": n,
             "answers": [f"{n} stones", "none", f"{n} stones"]} for n in range(NUM_ROWS)]  # fmt: skip
    put(folder / "TextVQA_train.json", json.dumps({"dataset_type": "train", "data": rows}))
    return [Expected(pictures=row.pictures, turns=row.turns, id=str(n)) for n, row in enumerate(asked())]


@layout
def questions_by_their_ids(folder: Path) -> list[Expected]:
    pictures(folder / "images", "9{n}.png")
    rows = {f"q{n}": {"imageId": f"9{n}", "question": f"How many stones in {n}?", "answer": f"{n} stones"}
            for n in range(NUM_ROWS)}  # fmt: skip
    put(folder / "train_balanced_questions.json", json.dumps(rows))
    return [Expected(pictures=row.pictures, turns=row.turns, id=f"q{n}") for n, row in enumerate(asked())]


@layout
def clevr(folder: Path) -> list[Expected]:
    pictures(folder / "images" / "train", "CLEVR_{n}.png")
    rows = [{"image_filename": f"CLEVR_{n}.png", "question_index": n, "question": f"How many stones in {n}?",
             "answer": f"{n} stones", "program": [{"inputs": []}]} for n in range(NUM_ROWS)]  # fmt: skip
    put(folder / "questions" / "train.json", json.dumps({"info": {"split": "train"}, "questions": rows}))
    return asked()


@layout
def questions_of_charts_whose_answer_is_a_label(folder: Path) -> list[Expected]:
    pictures(folder / "png")
    rows = [
        {"imgname": f"{n}.png", "query": f"How many stones in {n}?", "label": f"{n} stones"} for n in range(NUM_ROWS)
    ]
    put(folder / "train_human.json", json.dumps(rows, indent=2))
    return asked()


@layout
def a_metadata_file_with_numbers_and_nan(folder: Path) -> list[Expected]:
    pictures(folder)
    rows = "".join(f'{{"file_name": "{n}.png", "text": {n}, "score": NaN}}\n' for n in range(NUM_ROWS))
    put(folder / "metadata.jsonl", rows)
    return [Expected(pictures=(png(n),), turns=(str(n),)) for n in range(NUM_ROWS)]


@layout
def metadata_files_in_the_folders(folder: Path) -> list[Expected]:
    for n in range(NUM_ROWS):
        put(folder / "part" / str(n % 2) / f"{n}.png", png(n))
    order = []
    for part in range(2):
        numbers = range(part, NUM_ROWS, 2)
        order += numbers
        put(
            folder / "part" / str(part) / "metadata.jsonl",
            lines({"file_name": f"{n}.png", "text": said(n)} for n in numbers),
        )
    rows = captioned()
    return [rows[n] for n in order]


@layout
def several_captions_in_a_row(folder: Path) -> list[Expected]:
    pictures(folder)
    put(
        folder / "metadata.jsonl",
        lines({"file_name": f"{n}.png", "captions": [said(n), "Again."]} for n in range(NUM_ROWS)),
    )
    return [Expected(pictures=(png(n),), turns=(text,)) for n in range(NUM_ROWS) for text in (said(n), "Again.")]


@layout
def texts_beside_phone_pictures(folder: Path) -> list[Expected]:
    names = ["IMG 0.PNG", "IMG 1.jfif", "IMG 2.png", "IMG 3.png", "IMG 4.png", "IMG 5.png"]
    texts = ["IMG 0.txt", "IMG 1.txt", "IMG 2.png.txt", "IMG 3.TXT", "img 4.txt", "IMG 5.caption"]
    for n, (name, text) in enumerate(zip(names, texts, strict=True)):
        put(folder / name, png(n))
        put(folder / text, f"{said(n)}, yes\n{said(n)}, no\n" if n == 5 else f"{said(n)}\n")
    put(folder / "scan.pdf", "%PDF-1.4")
    rows = captioned()
    return [*rows[:5], Expected(pictures=(png(5),), turns=(f"{said(5)}, yes\n{said(5)}, no",))]


@layout
def texts_in_a_folder_beside(folder: Path) -> list[Expected]:
    for n in range(NUM_ROWS):
        put(folder / "images" / "a" / f"{n}.png", png(n))
        put(folder / "captions" / "a" / f"{n}.txt", said(n))
    return captioned()


@layout
def classes_by_folder(folder: Path) -> list[Expected]:
    for n in range(NUM_ROWS):
        put(folder / ("robin" if n < 3 else "house_wren") / f"{n}.png", png(n))
    found = [Expected(pictures=(png(n),), turns=("robin" if n < 3 else "house wren",)) for n in range(NUM_ROWS)]
    return [*found[3:], *found[:3]]


@layout
def classes_in_a_csv_whose_ids_are_names(folder: Path) -> list[Expected]:
    pictures(folder / "train", "x{n}.png")
    write_csv(
        folder / "train.csv", [["id", "breed"], *([f"x{n}", "pug" if n % 2 else "beagle"] for n in range(NUM_ROWS))]
    )
    return [Expected(pictures=(png(n),), turns=("pug" if n % 2 else "beagle",), id=f"x{n}") for n in range(NUM_ROWS)]


@layout
def class_numbers_with_names(folder: Path) -> list[Expected]:
    features = {"image": {"_type": "Image"}, "label": {"names": ["apple_pie", "soup"], "_type": "ClassLabel"}}
    table = pa.table({"image": [{"bytes": png(n), "path": None} for n in range(NUM_ROWS)], "label": [0, 1] * 3})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, folder / "a.parquet")
    return [Expected(pictures=(png(n),), turns=("soup" if n % 2 else "apple pie",)) for n in range(NUM_ROWS)]


@layout
def base64_in_json_lines(folder: Path) -> list[Expected]:
    coded = [base64.b64encode(png(n)).decode() for n in range(NUM_ROWS)]
    coded[0] = f"data:image/png;base64,{coded[0]}"
    put(folder / "rows.json", lines({"img": text, "caption": said(n)} for n, text in enumerate(coded)))
    return captioned()


@layout
def an_arrow_stream(folder: Path) -> list[Expected]:
    cells = pa.array(
        [{"bytes": png(n), "path": None} for n in range(NUM_ROWS)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": cells, "text": [said(n) for n in range(NUM_ROWS)]})
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    put(folder / "dataset_info.json", json.dumps({"features": {"text": {"dtype": "string"}}, "splits": {}}))
    put(folder / "state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    return captioned()


@layout
def paths_in_structs(folder: Path) -> list[Expected]:
    pictures(folder / "img")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": None, "path": f"img/{n}.png"} for n in range(NUM_ROWS)], kind)
    pq.write_table(pa.table({"image": cells, "text": [said(n) for n in range(NUM_ROWS)]}), folder / "a.parquet")
    return captioned()


@layout
def messages_with_parts(folder: Path) -> list[Expected]:
    kinds = [{"index": None, "type": "text", "text": "Look:\n"}, {"index": 0, "type": "image", "text": None}]
    answers = [[{"index": None, "type": "text", "text": said(n)}] for n in range(NUM_ROWS)]
    rows = [[{"role": "user", "content": kinds}, {"role": "assistant", "content": answer}] for answer in answers]
    parquet(
        folder / "train-0.parquet", messages=rows, images=[[{"bytes": png(n), "path": None}] for n in range(NUM_ROWS)]
    )
    return [Expected(pictures=(png(n),), turns=("Look:\n<image>", said(n))) for n in range(NUM_ROWS)]


@layout
def pictures_within_the_parts(folder: Path) -> list[Expected]:
    pictures(folder / "img")
    urls = [f"data:image/png;base64,{base64.b64encode(png(n)).decode()}" for n in range(NUM_ROWS)]
    parts = [
        {"image": f"img/{n}.png"} if n % 2 else {"type": "image_url", "image_url": {"url": urls[n]}}
        for n in range(NUM_ROWS)
    ]
    rows = [{"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]},
                          {"role": "assistant", "content": said(n)}]} for n, part in enumerate(parts)]  # fmt: skip
    put(folder / "train.jsonl", lines(rows))
    return [Expected(pictures=(png(n),), turns=("<image>What?", said(n))) for n in range(NUM_ROWS)]


@layout
def pairs_of_user_and_assistant(folder: Path) -> list[Expected]:
    texts = [
        [{"user": "What?", "assistant": said(n), "source": "x"}, {"user": "Sure?", "assistant": "Yes."}]
        for n in range(NUM_ROWS)
    ]
    parquet(
        folder / "train-0.parquet", images=[[{"bytes": png(n), "path": None}] for n in range(NUM_ROWS)], texts=texts
    )
    return [Expected(pictures=(png(n),), turns=("What?", said(n), "Sure?", "Yes.")) for n in range(NUM_ROWS)]


@layout
def prompt_and_completion(folder: Path) -> list[Expected]:
    pictures(folder)
    rows = [{"images": [f"{n}.png"], "prompt": [{"role": "user", "content": "What?"}],
             "completion": [{"role": "assistant", "content": said(n)}]} for n in range(NUM_ROWS)]  # fmt: skip
    put(folder / "train.jsonl", lines(rows))
    return [Expected(pictures=(png(n),), turns=("What?", said(n))) for n in range(NUM_ROWS)]


@layout
def conversations_as_json_text_in_a_csv(folder: Path) -> list[Expected]:
    pictures(folder)
    talks = [
        json.dumps([{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": said(n)}])
        for n in range(NUM_ROWS)
    ]
    write_csv(
        folder / "train.csv", [["images", "conversations"], *([f'["{n}.png"]', talk] for n, talk in enumerate(talks))]
    )
    return [Expected(pictures=(png(n),), turns=("<image>What?", said(n))) for n in range(NUM_ROWS)]


@layout
def alpaca_with_input_system_and_history(folder: Path) -> list[Expected]:
    pictures(folder)
    rows = [{"instruction": "What?", "input": f"Number {n}" if n else "", "output": said(n), "images": [f"{n}.png"],
             "system": "Be short.", "history": [["Hi", "Hello"]]} for n in range(NUM_ROWS)]  # fmt: skip
    put(folder / "train.json", json.dumps(rows))
    questions = ["What?", *(f"What?\nNumber {n}" for n in range(1, NUM_ROWS))]
    return [
        Expected(pictures=(png(n),), turns=("Be short.", "Hi", "Hello", question, said(n)))
        for n, question in enumerate(questions)
    ]


@layout
def several_pictures_and_a_question(folder: Path) -> list[Expected]:
    pictures(folder)
    rows = [{"images": [f"{n}.png", "0.png"], "question": f"Are both {n}?", "answer": n == 0} for n in range(NUM_ROWS)]
    put(folder / "pairs.jsonl", lines(rows))
    return [Expected(pictures=(png(n), png(0)), turns=(f"Are both {n}?", json.dumps(n == 0))) for n in range(NUM_ROWS)]


@layout
def tars_of_img2dataset(folder: Path) -> list[Expected]:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for n in range(NUM_ROWS):
            facts = {"caption": said(n), "url": "https://example.org", "similarity": float("nan"), "status": "success"}
            for suffix, data in (("png", png(n)), ("json", json.dumps(facts).encode()), ("txt", said(n).encode())):
                member = tarfile.TarInfo(f"{n:09}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    parquet(folder / "00000.parquet", caption=[said(n) for n in range(NUM_ROWS)])
    put(folder / "00000_stats.json", json.dumps({"count": NUM_ROWS}))
    return captioned([f"{n:09}" for n in range(NUM_ROWS)])


@layout
def tars_with_questions_in_json(folder: Path) -> list[Expected]:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as archive:
        for n in range(NUM_ROWS):
            facts = {"question": f"How many stones in {n}?", "answer": f"{n} stones"}
            for suffix, data in (("png", png(n)), ("json", json.dumps(facts).encode())):
                member = tarfile.TarInfo(f"{n}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return [Expected(pictures=row.pictures, turns=row.turns, id=str(n)) for n, row in enumerate(asked())]


@layout
def a_json_file_beside_each_image(folder: Path) -> list[Expected]:
    for n in range(NUM_ROWS):
        put(folder / "a" / f"{n}.png", png(n))
        put(folder / "a" / f"{n}.json", json.dumps({"question": f"How many stones in {n}?", "answer": f"{n} stones"}))
    return asked()


@layout
def names_mapped_to_captions(folder: Path) -> list[Expected]:
    pictures(folder / "images")
    put(folder / "captions.json", json.dumps({f"{n}.png": [said(n), "Again."] for n in range(NUM_ROWS)}, indent=1))
    return [Expected(pictures=(png(n),), turns=(text,)) for n in range(NUM_ROWS) for text in (said(n), "Again.")]


@layout
def columns_of_values_in_one_line_of_json(folder: Path) -> list[Expected]:
    pictures(folder)
    columns = {"image": [f"{n}.png" for n in range(NUM_ROWS)], "text": [said(n) for n in range(NUM_ROWS)]}
    put(folder / "data.json", json.dumps(columns))
    return captioned()


@layout
def kaggles_test_and_submission_are_no_training_rows(folder: Path) -> list[Expected]:
    pictures(folder / "train", "x{n}.png")
    put(folder / "test" / "y.png", png(9))
    write_csv(
        folder / "train.csv", [["id", "breed"], *([f"x{n}", "pug" if n % 2 else "beagle"] for n in range(NUM_ROWS))]
    )
    write_csv(folder / "test.csv", [["id"], ["y"]])
    write_csv(folder / "sample_submission.csv", [["id", "breed"], ["y", "beagle"]])
    return [Expected(pictures=(png(n),), turns=("pug" if n % 2 else "beagle",), id=f"x{n}") for n in range(NUM_ROWS)]


@layout
def pictures_named_in_the_texts(folder: Path) -> list[Expected]:
    pictures(folder / "img")
    questions = [{"from": "user", "value": f"Picture 1: <img>img/{n}.png</img>\nWhat?"} for n in range(NUM_ROWS)]
    talks = [[question, {"from": "assistant", "value": said(n)}] for n, question in enumerate(questions)]
    rows = [{"id": f"i{n}", "conversations": talk} for n, talk in enumerate(talks)]
    put(folder / "train.json", json.dumps(rows))
    return [Expected(pictures=(png(n),), turns=("<image>What?", said(n)), id=f"i{n}") for n in range(NUM_ROWS)]


@layout
def tars_with_a_question_and_an_answer_as_texts(folder: Path) -> list[Expected]:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "0.tar.gz", "w:gz") as archive:
        for n in range(NUM_ROWS):
            texts = (("question.txt", f"How many stones in {n}?"), ("answer.txt", f"{n} stones"))
            for suffix, data in (("png", png(n)), *((name, text.encode()) for name, text in texts)):
                member = tarfile.TarInfo(f"{n}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return [Expected(pictures=row.pictures, turns=row.turns, id=str(n)) for n, row in enumerate(asked())]


@layout
def numbers_of_choices(folder: Path) -> list[Expected]:
    cells = pa.array([{"bytes": png(n), "path": None} if n else None for n in range(NUM_ROWS)])
    table = {"question": [f"How many in {n}?" for n in range(NUM_ROWS)], "choices": [["none", "some"]] * NUM_ROWS,
             "answer": [n % 2 for n in range(NUM_ROWS)], "hint": ["Look."] * NUM_ROWS}  # fmt: skip
    parquet(folder / "train-0.parquet", image=cells, **table)
    questions = [f"How many in {n}?\nA. none\nB. some" for n in range(NUM_ROWS)]
    return [
        Expected(pictures=(png(n),) if n else (), turns=(question, "some" if n % 2 else "none"))
        for n, question in enumerate(questions)
    ]


@layout
def letters_of_options_in_a_text(folder: Path) -> list[Expected]:
    cells = [{"bytes": png(n), "path": None} for n in range(NUM_ROWS)]
    parquet(folder / "test-0.parquet", id=[f"v{n}" for n in range(NUM_ROWS)], options=["['a', 'b']"] * NUM_ROWS,
            question=[f"<image 1> Which, {n}?" for n in range(NUM_ROWS)], answer=["A", "B"] * 3, image_1=cells,
            image_2=pa.nulls(NUM_ROWS, pa.struct([("bytes", pa.binary())])))  # fmt: skip
    return [Expected(pictures=(png(n),), turns=(f"<image> Which, {n}?\nA. a\nB. b", "ab"[n % 2]), id=f"v{n}")
            for n in range(NUM_ROWS)]  # fmt: skip
