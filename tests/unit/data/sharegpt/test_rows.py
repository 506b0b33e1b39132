"""Reading ShareGPT: what LLaMA-Factory reads, and an error by row for what it would drop or trip over."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.formats import require_format
from mllm_assets.data.sharegpt.rows import Message
from mllm_assets.errors import DataError
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import made_spec, png, run_line, write_source

ENTRY = {
    "file_name": "rows.json",
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
TURNS = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "That."}]


def write(folder: Path, rows: Any, entry: dict[str, Any] | None = None) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "a.png").write_bytes(png(1))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": entry or ENTRY}))
    (folder / "rows.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return folder


def failing(folder: Path, rows: Any, entry: dict[str, Any] | None = None) -> str:
    write(folder, rows, entry)
    with pytest.raises(DataError) as caught:
        Dataset(folder).entry("rows").read()
    return str(caught.value)


def row(**fields: Any) -> dict[str, Any]:
    return {"messages": TURNS, "images": ["images/a.png"], **fields}


def test_the_parity_rows_read_with_systems_turns_and_several_images(parity_dir: Path) -> None:
    rows = Dataset(parity_dir / "data").entry("gemma3_vlm_train").rows
    assert len(rows) == 48
    assert rows[3].messages[0] == Message("system", "You answer in one line.")
    assert {len(r.images) for r in rows} == {1, 2}
    assert len(Dataset(parity_dir / "data").entry("gemma3_vlm_train").read(max_samples=5)) == 5


def test_what_the_splits_write_reads_back(layout: Layout) -> None:
    write_source(layout.root, [(png(n), f"picture {n}") for n in range(12)])
    *_, version = run_line(made_spec(), layout)
    rows = Dataset(layout.data).entry("made_train").rows
    assert len(rows) == version.num_train
    assert rows[0].messages[0].content == "<image>What is this?"
    assert all(len(r.id) == 16 for r in rows)


def test_from_and_value_are_read_where_an_entry_has_no_tags(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "That."}]
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "talk", "images": "images"}}
    write(tmp_path, [{"talk": turns, "images": ["images/a.png"]}], entry)
    assert [m.role for m in Dataset(tmp_path).entry("rows").rows[0].messages] == ["user", "assistant"]


def test_jsonl_is_read_and_its_line_is_named(tmp_path: Path) -> None:
    write(tmp_path, [], {**ENTRY, "file_name": "rows.jsonl"})
    (tmp_path / "rows.jsonl").write_text(json.dumps(row()) + "\n" + json.dumps(row()) + "\n")
    assert len(Dataset(tmp_path).entry("rows").rows) == 2
    (tmp_path / "rows.jsonl").write_text(json.dumps(row()) + '\n{"messages": }\n')
    with pytest.raises(DataError, match=r"rows.jsonl, line 2, column 14"):
        Dataset(tmp_path).entry("rows").read()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('[\n{"messages" 1}\n]', "rows.json, line 2, column 13"),
        ({"a": 1}, "'messages' should be a list of messages"),
        ([], "has no rows, but entry 'rows' names it"),
        ([row(), 3], "rows.json, row 1: expected an object, got int"),
        ([row(messages=[])], "row 0: 'messages' should be a list of messages"),
        ([row(messages=TURNS[1:])], "row 0, message 0: expected the role 'user', got 'assistant'"),
        ([row(messages=TURNS[:1])], "row 0: the last message is not the assistant's"),
        ([row(messages=[TURNS[0], TURNS[0]])], "row 0, message 1: expected the role 'assistant', got 'user'"),
        ([row(messages=[{"role": "user"}])], "row 0, message 0: expected an object with 'role' and 'content'"),
        ([row(messages=[{"role": "user", "content": 1}])], "row 0, message 0: expected a text, got int"),
        ([row(images=[])], "row 0: 1 <image> placeholders, but 0 images. Write one <image>"),
        ([row(id="abc", images=["images/a.png"] * 2)], "row 0 (abc): 1 <image> placeholders, but 2 images"),
        (
            [row(messages=[{"role": "user", "content": "What?"}, {"role": "assistant", "content": "<image>"}])],
            "row 0, message 1: the assistant's text holds <image>, and only a user's message can show a picture",
        ),
        (
            [row(messages=[{"role": "system", "content": "See <image>."}, *TURNS])],
            "row 0, message 0: the system's text holds <image>",
        ),
        ([row(images=["images/b.png"])], "b.png. Paths are relative to"),
        ([row(images=["../../etc/passwd"])], "the path '../../etc/passwd' leaves"),
        ([row(images=[1])], "'images' should be a list of paths"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, rows: Any, message: str) -> None:
    assert message in failing(tmp_path, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formatting": "chatml"}, "has the formatting 'chatml'; expected one of sharegpt, openai, alpaca"),
        ({"hf_hub_url": "a/b"}, "sets `hf_hub_url`, but datasets are read from local files here"),
        ({"ranking": True}, "sets `ranking`, and `columns` does not name both answers"),
        ({"split": "train[:10]"}, "sets `split` to 'train[:10]', expected 'train'"),
        ({"num_samples": 3}, "sets `num_samples`, which draws rows at random"),
        ({"file_name": "rows.csv"}, "There is no file"),
        ({"file_name": "../rows.json"}, "the path '../rows.json' leaves"),
        ({"file_name": "gone.json"}, "There is no file"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert message in failing(tmp_path, [row()], {**ENTRY, **change})


PAIR = {"chosen": TURNS[1], "rejected": {"role": "assistant", "content": "Another."}}
COLUMNS = {"messages": "messages", "images": "images", "chosen": "chosen", "rejected": "rejected"}


@pytest.mark.parametrize("formatting", ["sharegpt", "alpaca"])
def test_a_pair_is_its_preferred_answer_and_the_rejected_one(tmp_path: Path, formatting: str) -> None:
    """What LLaMA-Factory reads with `ranking`."""
    entry = {**ENTRY, "ranking": True, "columns": COLUMNS}
    rows: list[dict[str, Any]] = [{"messages": TURNS[:1], "images": ["images/a.png"], **PAIR}]
    if formatting == "alpaca":
        entry = {"file_name": "rows.json", "ranking": True, "columns": {**COLUMNS, "prompt": "asked"}}
        rows = [{"asked": "<image>What?", "images": ["images/a.png"], "chosen": "That.", "rejected": "Another."}]
    [read] = Dataset(write(tmp_path, rows, entry)).entry("rows").rows
    assert [message.content for message in read.messages] == ["<image>What?", "That."]
    assert read.rejected is not None and read.rejected.content == "Another."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": None}, "'rejected': expected an object with 'role' and 'content'"),
        ({"rejected": TURNS[0]}, "'rejected': expected the role 'assistant', got 'user'"),
        ({"rejected": {**TURNS[1], "content": "<image>"}}, "'rejected': an answer cannot show a picture"),
        ({"chosen": TURNS[0]}, "message 1: expected the role 'assistant', got 'user'"),
        ({"messages": TURNS}, "message 2: expected the role 'user', got 'assistant'"),
    ],
)
def test_a_wrong_pair_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = [{"messages": TURNS[:1], "images": ["images/a.png"], **PAIR, **change}]
    assert message in failing(tmp_path, rows, {**ENTRY, "ranking": True, "columns": COLUMNS})


def test_an_image_behind_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(png(1))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(outside)
    assert "leaves" in failing(folder, [row(images=["link.png"])])


def test_the_digest_follows_file_images_and_tags(tmp_path: Path) -> None:
    write(tmp_path, [row()])
    digests = [Dataset(tmp_path).entry("rows").digest]
    (tmp_path / "images" / "a.png").write_bytes(png(2))
    digests.append(Dataset(tmp_path).entry("rows").digest)
    write(tmp_path, [row(), row()])
    digests.append(Dataset(tmp_path).entry("rows").digest)
    assert len(set(digests)) == 3
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert Dataset(tmp_path / "copy").entry("rows").digest == digests[2]


def test_the_digest_notices_two_pictures_that_change_places(tmp_path: Path) -> None:
    """Each answer then belongs to the other picture: training under the old name would be on other data."""
    write(tmp_path, [row(), row(images=["images/b.png"])])
    first, second = (tmp_path / "images" / name for name in ("a.png", "b.png"))
    second.write_bytes(png(2))
    before = Dataset(tmp_path).entry("rows").digest
    first.write_bytes(png(2))
    second.write_bytes(png(1))
    assert Dataset(tmp_path).entry("rows").digest != before


def test_a_file_is_looked_at_once_for_its_format_until_somebody_writes_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line looked at its splits eight times, one more for each time that their rows were read."""
    path, opened, open_path = tmp_path / "rows.json", list[Path](), Path.open
    path.write_text('[{"text": "a"}]')
    monkeypatch.setattr(Path, "open", lambda file, *mode, **how: opened.append(file) or open_path(file, *mode, **how))
    assert [require_format(path).kind for _ in range(3)] == ["json_list"] * 3
    assert opened == [path]
    before, other = path.stat(), tmp_path / "other"
    other.write_bytes(b"ab,cd,ef\n1,2,33")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert path.stat().st_size == before.st_size
    assert require_format(path).kind == "delimited"
