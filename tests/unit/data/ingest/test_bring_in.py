"""A LLaMA-Factory directory as a source: its conversations and images go through as they are."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm_assets.data.curate.checks import counts_add_up
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import MllmAssetsError
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import made_spec, png, run_line

pytestmark = pytest.mark.not_fast

OPENAI = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}
SHAREGPT = {"formatting": "sharegpt", "columns": {"messages": "conversations", "images": "images", "system": "rule"}}


def theirs(
    layout: Layout, rows: list[Any], entry: dict[str, Any], name: str = "train", file: str = "rows.json"
) -> Path:
    """A directory that somebody else made, with six images."""
    folder = layout.root / "theirs"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for n in range(6):
        (folder / "images" / f"{n}.png").write_bytes(png(n))
    path = folder / "dataset_info.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, name: {"file_name": file, **entry}}))
    (folder / file).write_text(json.dumps(rows))
    return folder


def spec_of(num_train: int = 4, num_val: int = 2, **fields: Any) -> DatasetSpec:
    return made_spec(num_train, num_val, source=SourceSpec(kind="llamafactory", path="theirs", **fields), prompts=())


def said(rows: list[Row]) -> set[tuple[Any, ...]]:
    return {(*((m.role, m.content) for m in row.messages), len(row.images)) for row in rows}


def made(layout: Layout) -> list[Row]:
    return Dataset(layout.data).entry("made_train").rows + Dataset(layout.data).entry("made_val").rows


def test_what_training_reads_is_what_it_read_of_the_directory(layout: Layout) -> None:
    """Several turns, several images, a system message: read here and there, row by row the same."""
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look: <image> and <image>"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "And <image>?"},
        {"role": "assistant", "content": "Three."},
    ]
    rows = [{"messages": talk, "images": [f"images/{n}.png" for n in range(3)]}]
    rows += [
        {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": f"That {n}."}],
         "images": [f"images/{n}.png"]}
        for n in range(3, 6)
    ]  # fmt: skip
    folder = theirs(layout, rows, OPENAI)
    *_, version = run_line(spec_of(3, 1), layout)
    assert counts_add_up(version).passed and version.num_rejected == 0
    assert said(made(layout)) == said(Dataset(folder).entry("train").rows)


def test_from_and_value_with_a_system_column(layout: Layout) -> None:
    talk = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "That."}]
    rows = [{"conversations": talk, "images": [f"images/{n}.png"], "rule": f"Rule {n}"} for n in range(6)]
    folder = theirs(layout, rows, SHAREGPT)
    run_line(spec_of(), layout)
    assert said(made(layout)) == said(Dataset(folder).entry("train").rows)
    assert {row.messages[0].content for row in made(layout)} == {f"Rule {n}" for n in range(6)}


def test_tags_of_their_own(layout: Layout) -> None:
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "ask", "assistant_tag": "bot", "system_tag": "rule"}
    talk = [{"who": "rule", "what": "R"}, {"who": "ask", "what": "<image>?"}, {"who": "bot", "what": "!"}]
    rows = [{"talk": talk, "pics": [f"images/{n}.png"]} for n in range(6)]
    entry = {"formatting": "sharegpt", "columns": {"messages": "talk", "images": "pics"}, "tags": tags}
    folder = theirs(layout, rows, entry)
    run_line(spec_of(), layout)
    assert said(made(layout)) == said(Dataset(folder).entry("train").rows) == {
        (("system", "R"), ("user", "<image>?"), ("assistant", "!"), 1)
    }  # fmt: skip


def test_alpaca_rows(layout: Layout) -> None:
    rows = [
        {"instruction": "<image>What?", "input": "", "output": f"That {n}.", "images": [f"images/{n}.png"]}
        for n in range(6)
    ]
    columns = {"prompt": "instruction", "query": "input", "response": "output", "images": "images"}
    folder = theirs(layout, rows, {"columns": columns})
    run_line(spec_of(), layout)
    assert said(made(layout)) == said(Dataset(folder).entry("train").rows)


def test_parquet_with_embedded_images(layout: Layout) -> None:
    """LLaMA-Factory reads images from paths and from bytes."""
    folder = theirs(layout, [], {**OPENAI, "file_name": "rows.parquet"})
    talk = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "That."}]
    images = [[{"bytes": png(n), "path": None}] for n in range(6)]
    pq.write_table(pa.table({"messages": [talk] * 6, "images": images}), folder / "rows.parquet")
    *_, version = run_line(spec_of(), layout)
    assert (version.num_train, version.num_val) == (4, 2)


def test_each_row_that_llamafactory_would_drop_or_trip_over_has_a_reason(layout: Layout) -> None:
    def row(images: list[str], *turns: tuple[str, Any]) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": text} for role, text in turns], "images": images}

    fine = [row([f"images/{n}.png"], ("user", "<image>?"), ("assistant", "!")) for n in range(6)]
    bad = {
        "image_missing": row(["images/gone.png"], ("user", "<image>?"), ("assistant", "!")),
        "image_outside_root": row(["../../secret.png"], ("user", "<image>?"), ("assistant", "!")),
        "image_unreadable": row([3], ("user", "<image>?"), ("assistant", "!")),  # type: ignore[list-item]
        "messages_empty": row(["images/0.png"], ("user", "<image>?"), ("assistant", " ")),
        "messages_placeholder_count": row(["images/0.png"], ("user", "<image><image>?"), ("assistant", "!")),
        "messages_role_order": row(["images/0.png"], ("assistant", "!"), ("user", "<image>?")),
        "messages_unreadable": row(["images/0.png"], ("user", 7), ("assistant", "!")),
        "messages_control_token": row(["images/0.png"], ("user", "<image>?"), ("assistant", "<end_of_turn>")),
        "messages_undecodable": row(["images/0.png"], ("user", "<image>?"), ("assistant", "half \ud83d")),
        "row_unreadable": "a text",
    }
    theirs(layout, [*fine, *bad.values()], OPENAI)
    *_, version = run_line(spec_of(), layout)
    assert version.reject_reasons == dict.fromkeys(sorted(bad), 1)
    assert counts_add_up(version).passed and version.num_raw == 6 + len(bad)
    assert len(made(layout)) == 6


def test_a_line_that_is_not_json_is_a_row_with_a_reason(layout: Layout) -> None:
    folder = theirs(layout, [], {**OPENAI, "file_name": "rows.jsonl"})
    talk = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}]
    lines = [json.dumps({"messages": talk, "images": [f"images/{n}.png"]}) for n in range(6)]
    (folder / "rows.jsonl").write_text("\n".join([*lines[:3], '{"messages": ', *lines[3:]]))
    *_, version = run_line(spec_of(), layout)
    assert version.reject_reasons == {"row_unreadable": 1}


def test_the_directorys_own_split_is_kept(layout: Layout) -> None:
    def talk(n: int) -> dict[str, Any]:
        turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": f"That {n}."}]
        return {"messages": turns, "images": [f"images/{n}.png"]}

    theirs(layout, [talk(n) for n in range(4)], OPENAI, "our_train", "train.json")
    folder = theirs(layout, [talk(n) for n in range(3, 6)], OPENAI, "our_val", "val.json")
    *_, version = run_line(spec_of(split="our_train", val_split="our_val"), layout)
    assert (version.num_train, version.num_val, version.num_unused) == (4, 3, 0)
    assert said(Dataset(layout.data).entry("made_val").rows) == said(Dataset(folder).entry("our_val").rows)


@pytest.mark.parametrize(
    ("fields", "entry", "message"),
    [
        ({"split": "trian"}, {}, "has no dataset 'trian'. The nearest are train"),
        ({}, {"hf_hub_url": "a/b"}, "sets `hf_hub_url`, but datasets are read from local files here"),
        ({}, {"formatting": "chatml"}, "has the formatting 'chatml'"),
        ({}, {"file_name": "gone.json"}, "There is no file"),
        ({}, {"file_name": "../rows.json"}, "the path '../rows.json' leaves"),
    ],
)
def test_a_directory_that_cannot_be_brought_in_is_named(
    layout: Layout, fields: dict[str, Any], entry: dict[str, Any], message: str
) -> None:
    theirs(layout, [], {**OPENAI, **entry})
    theirs(layout, [], OPENAI, "other", "other.json")
    with pytest.raises(MllmAssetsError) as caught:
        ingest(spec_of(**fields), layout)
    assert message in str(caught.value)


def test_the_only_entry_of_a_directory_needs_no_name(layout: Layout) -> None:
    talk = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}]
    theirs(layout, [{"messages": talk, "images": [f"images/{n}.png"]} for n in range(6)], OPENAI, "something")
    assert ingest(spec_of(), layout).num_samples == 6
