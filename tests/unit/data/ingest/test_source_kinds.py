"""Sources of Parquet and Arrow files and LLaMA-Factory directories."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm_assets.data.ingest.sources import read_source
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.layout import Layout
from tests.unit.data.ingest.source_lines import ASK, answers, of_kind, refused, rejects, through
from tests.unit.data.made_datasets import made_spec, png, write_source

pytestmark = pytest.mark.not_fast


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


@pytest.mark.attack("JSON")
def test_a_conversation_nested_by_the_thousand_costs_its_row_only(layout: Layout) -> None:
    turns = json.dumps([{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That"}])
    table = {"image": [png(n) for n in range(7)], "messages": [*[turns] * 6, "[" * 100_000]}
    pq.write_table(pa.table(table), layout.root / "source.parquet")
    version, _ = through(of_kind("parquet", "source.parquet", messages_column="messages"), layout)
    assert version.reject_reasons == {"messages_unreadable": 1}


def test_a_sample_of_a_table_is_found_by_its_file_and_row(layout: Layout) -> None:
    for name in ("a/0.parquet", "b/1.parquet"):
        rows = [(png(n + len(name)), f"{name} {n}") for n in range(20)]
        write_source((layout.root / name).parent, [*rows, (None, "none")], name[2:])
    through(of_kind("parquet", ("a/*.parquet", "b/1.parquet")), layout)
    assert [row["source_location"] for row in rejects(layout)] == ["a/0.parquet:row 20", "b/1.parquet:row 20"]
    row = next(read_source(SourceSpec(kind="parquet", path="b/1.parquet", image_column="text"), layout.root))
    assert (row.defect, row.detail) == ("image_missing", "b/1.parquet 0")


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
