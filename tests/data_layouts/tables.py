"""Tables: captions and classes in CSV, TSV, JSON, Parquet and Arrow."""

import base64
import json
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data_layouts.made import NUM_ROWS, Expected, captioned, layout, lines, pictures, put, said, write_csv
from tests.unit.data.made_datasets import png


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
def icdars_words_in_quotes_after_a_space(folder: Path) -> list[Expected]:
    pictures(folder, "word_{n}.png")
    put(
        folder / "gt.txt", "".join(f'word_{n}.png, "{said(n)}, ""2"" \n' for n in range(NUM_ROWS)).replace(" \n", '"\n')
    )
    return [Expected(pictures=(png(n),), turns=(f'{said(n)}, "2"',)) for n in range(NUM_ROWS)]


@layout
def food_101s_lists_of_names_by_class(folder: Path) -> list[Expected]:
    classes = ("apple_pie", "soup")
    for n in range(NUM_ROWS):
        put(folder / "images" / classes[n % 2] / f"100{n}.png", png(n))
    for side, numbers in (("train", range(4)), ("test", range(4, NUM_ROWS))):
        named = {label: [f"{label}/100{n}" for n in numbers if n % 2 == k] for k, label in enumerate(classes)}
        put(folder / "meta" / f"{side}.json", json.dumps(named))
        put(folder / "meta" / f"{side}.txt", "\n".join(name for names in named.values() for name in names))
    put(folder / "meta" / "classes.txt", "\n".join(classes))
    return [Expected(pictures=(png(n),), turns=("soup" if n % 2 else "apple pie",)) for n in (0, 2, 1, 3, 4, 5)]


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
def several_pictures_and_a_question(folder: Path) -> list[Expected]:
    pictures(folder)
    rows = [{"images": [f"{n}.png", "0.png"], "question": f"Are both {n}?", "answer": n == 0} for n in range(NUM_ROWS)]
    put(folder / "pairs.jsonl", lines(rows))
    return [Expected(pictures=(png(n), png(0)), turns=(f"Are both {n}?", json.dumps(n == 0))) for n in range(NUM_ROWS)]


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
