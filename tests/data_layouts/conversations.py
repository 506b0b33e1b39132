"""Conversations in the notations of LLaVA, OpenAI, TRL, Alpaca and others."""

import base64
import json
from pathlib import Path

from tests.data_layouts.made import NUM_ROWS, Expected, layout, lines, parquet, pictures, put, said, write_csv
from tests.unit.data.made_datasets import png


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
def pictures_named_in_the_texts(folder: Path) -> list[Expected]:
    pictures(folder / "img")
    questions = [{"from": "user", "value": f"Picture 1: <img>img/{n}.png</img>\nWhat?"} for n in range(NUM_ROWS)]
    talks = [[question, {"from": "assistant", "value": said(n)}] for n, question in enumerate(questions)]
    rows = [{"id": f"i{n}", "conversations": talk} for n, talk in enumerate(talks)]
    put(folder / "train.json", json.dumps(rows))
    return [Expected(pictures=(png(n),), turns=("<image>What?", said(n)), id=f"i{n}") for n in range(NUM_ROWS)]
