"""Annotations joined with pictures by ids, and questions with answers."""

import base64
import json
from pathlib import Path

import pyarrow as pa

from tests.data_layouts.made import NUM_ROWS, Expected, asked, layout, parquet, pictures, put, said, write_csv
from tests.unit.data.made_datasets import png


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
def a_okvqa_with_numbers_of_cocos_pictures(folder: Path) -> list[Expected]:
    for n in range(NUM_ROWS):
        put(folder / "train2017" / f"{n:012}.png", png(n))
    rows = [
        {"split": "train", "image_id": n, "question_id": f"q{n}", "question": f"How many stones in {n}?",
         "choices": ["2 stones", "a lamp"], "correct_choice_idx": n % 2, "direct_answers": [f"{n} stones"] * 3 + ["2"]}
        for n in range(NUM_ROWS)
    ]  # fmt: skip
    put(folder / "aokvqa_v1p0_train.json", json.dumps(rows))
    return [Expected(pictures=row.pictures, turns=row.turns, id=f"q{n}") for n, row in enumerate(asked())]


@layout
def mmbench_with_a_column_for_each_choice(folder: Path) -> list[Expected]:
    """The question was asked without them, and its letter was learnt."""
    cells = [
        [n, f"How many stones in {n}?", f"{n} stones", "a lamp", "a kite" if n % 2 else "", "BA"[n % 2 == 0],
         base64.b64encode(png(n)).decode()]
        for n in range(NUM_ROWS)
    ]  # fmt: skip
    names = ["index", "question", "A", "B", "C", "answer", "image"]
    write_csv(folder / "dev.tsv", [names, *cells], delimiter="\t")
    return [
        Expected(
            pictures=(png(n),),
            turns=(f"How many stones in {n}?\nA. {n} stones\nB. a lamp" + "\nC. a kite" * (n % 2), answer),
            id=str(n),
        )
        for n in range(NUM_ROWS)
        for answer in ([f"{n} stones", "a lamp"][n % 2],)
    ]


@layout
def chartqa_with_answers_in_a_list_called_label(folder: Path) -> list[Expected]:
    cells = [{"bytes": png(n), "path": f"{n}.png"} for n in range(NUM_ROWS)]
    parquet(folder / "data" / "train-00000-of-00001.parquet", image=cells,
            query=[f"How many stones in {n}?" for n in range(NUM_ROWS)],
            label=[[f"{n} stones"] for n in range(NUM_ROWS)], human_or_machine=[0] * NUM_ROWS)  # fmt: skip
    return asked()


@layout
def textcaps_whose_paths_are_of_another_tree(folder: Path) -> list[Expected]:
    pictures(folder / "train_images", "00a{n}.png")
    rows = [
        {"caption_str": said(n), "caption_id": n, "image_id": f"00a{n}", "image_name": f"00a{n}",
         "reference_strs": [said(n), "A lamp"], "image_path": f"train/00a{n}.png"}
        for n in range(NUM_ROWS)
    ]  # fmt: skip
    put(folder / "TextCaps_0.1_train.json", json.dumps({"dataset_type": "train", "data": rows}))
    return [Expected(pictures=(png(n),), turns=(said(n),), id=f"00a{n}") for n in range(NUM_ROWS)]


@layout
def karpathys_split_with_sentences(folder: Path) -> list[Expected]:
    pictures(folder / "images")
    images = [{"filename": f"{n}.png", "imgid": n, "sentences": [{"raw": said(n)}, {"raw": "Again."}], "split": "train"}
              for n in range(NUM_ROWS)]  # fmt: skip
    put(folder / "dataset_flickr8k.json", json.dumps({"images": images, "dataset": "flickr8k"}))
    return [Expected(pictures=(png(n),), turns=(text,)) for n in range(NUM_ROWS) for text in (said(n), "Again.")]


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
