"""Folders of pictures with metadata or texts, and tars."""

import io
import json
import tarfile
from pathlib import Path

from tests.data_layouts.made import NUM_ROWS, Expected, asked, captioned, layout, lines, parquet, pictures, put, said
from tests.unit.data.made_datasets import png


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
