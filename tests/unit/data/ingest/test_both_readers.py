"""LLaMA-Factory's format by both ways in: a hand-written entry and `kind: llamafactory` understand a row alike."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.data.curate.checks import check_directory
from mllm_assets.data.ingest.llamafactory import read_llamafactory
from mllm_assets.data.ingest.source_rows import SourceRow
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.data.sharegpt.conversation import conversation_defect
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.entries import load_entry
from mllm_assets.data.sharegpt.parsing import parse_rows
from mllm_assets.data.sharegpt.rows import rows_of_entry
from mllm_assets.errors import DataError
from tests.unit.data.made_datasets import png

TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "That."}]
COLUMNS = {"messages": "conversations", "images": "images"}


def write(folder: Path, rows: list[Any], **entry: Any) -> Path:
    (folder / "a.png").write_bytes(png(1))
    entry = {"file_name": "rows.json", "formatting": "sharegpt", **entry}
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def row(turns: Any = TURNS, **fields: Any) -> dict[str, Any]:
    return {"conversations": turns, "images": ["a.png"], **fields}


def by_hand(folder: Path) -> list[str | None]:
    """What is wrong with each row."""
    return [problems[0] if problems else None for _, problems in parse_rows(folder, load_entry(folder, "mine"))]


def declared(folder: Path) -> list[SourceRow]:
    return list(read_llamafactory(SourceSpec(kind="llamafactory", path=str(folder)), folder))


def test_a_mark_is_read_and_a_dataset_takes_good_answers_only(tmp_path: Path) -> None:
    """Bad answers were learnt in hand-written directories, and the mark was not read in declared ones."""
    folder = write(tmp_path, [row(mark=True), row(mark=False), row(mark=None), row(mark="yes"), row()],
                   columns={**COLUMNS, "kto_tag": "mark"})  # fmt: skip
    good, bad, *unmarked = by_hand(folder)
    assert good is None and bad is None
    rows = [read for read, _ in parse_rows(folder, load_entry(folder, "mine")) if read is not None]
    assert [read.mark for read in rows] == [True, False]
    assert all("'mark' should be true or false, got " in (text or "") for text in unmarked)
    assert [r.defect for r in declared(folder)] == [None, "answer_marked_bad", *["answer_mark_unreadable"] * 3]


ROWS = [
    ("videos", {"videos": ["a.mp4"]}, "videos_unsupported", "there is no video "),
    ("audios", {"audios": ["a.wav"]}, "audios_unsupported", "'audios' cannot be trained on here"),
    ("system", {"system": 7}, "messages_unreadable", "'system': expected a text, got int"),
]


@pytest.mark.parametrize(("column", "fields", "reason", "text"), ROWS)
def test_a_column_that_cannot_be_used_is_refused(
    tmp_path: Path, column: str, fields: dict[str, Any], reason: str, text: str
) -> None:
    """`kind: llamafactory` took in the answers to tools' turns and to videos as if there were neither."""
    folder = write(tmp_path, [row(**fields), row(**{column: ""})], columns={**COLUMNS, column: column})
    first, second = by_hand(folder)
    assert text in (first or "") and second is None
    assert [r.defect for r in declared(folder)] == [reason, None]


@pytest.mark.parametrize(
    ("turns", "reason", "text"),
    [
        ([{"from": "observation", "value": "{}"}, TURNS[1]], "messages_role_order", "got 'observation'"),
        (
            [*TURNS, {"from": "function_call", "value": "{}"}],
            "messages_role_order",
            "the role 'human' or 'observation'",
        ),
        ([TURNS[0], {**TURNS[1], "tool_calls": [{}]}], "tools_unsupported", "with `formatting` openai only"),
        ([TURNS[0], {"from": "gpt", "value": None}], "messages_unreadable", "expected a text, got NoneType"),
        ([TURNS[0], {"role": "assistant", "content": "x"}], "messages_unreadable", "with 'from' and 'value'"),
        (TURNS[:1], "messages_role_order", "the last message is not the assistant's"),
        ([{"from": "gpt", "value": "x"}, {"from": "human", "value": "x"}], "messages_role_order", "the user first"),
        ("x", "messages_unreadable", "should be a list of messages"),
    ],
)
def test_turns_are_understood_alike(tmp_path: Path, turns: Any, reason: str, text: str) -> None:
    folder = write(tmp_path, [row(turns)], columns=COLUMNS)
    assert text in (by_hand(folder)[0] or "")
    assert [r.defect for r in declared(folder)] == [reason]


def test_tools_are_read_by_hand_and_counted_in_a_declared_dataset(tmp_path: Path) -> None:
    """A declared dataset publishes questions and answers only: its rows would have lost their tools."""
    call = [TURNS[0], {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]
    result = [*call, {"from": "observation", "value": "<image>seen"}, TURNS[1]]
    rows = [row(call, tools='[{"name": "f"}]'), row(result, images=["a.png", "a.png"], tools=""), row(tools=7)]
    folder = write(tmp_path, [*rows, row(tools="[]")], columns={**COLUMNS, "tools": "tools"})
    called, answered, wrong, plain = by_hand(folder)
    assert called is None and answered is None and plain is None
    assert "'tools' should be a list of tools as JSON" in (wrong or "")
    read = [read for read, _ in parse_rows(folder, load_entry(folder, "mine")) if read is not None]
    assert [message.role for message in read[1].messages] == ["user", "function", "observation", "assistant"]
    assert read[0].tools == '[{"name": "f"}]'
    assert [r.defect for r in declared(folder)] == [*["tools_unsupported"] * 3, None]


def test_a_system_turn_needs_its_tag_in_both(tmp_path: Path) -> None:
    """A `tags` block without system_tag resets it: LLaMA-Factory drops the row, a declared source took it in."""
    tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
    talk = [{"from": "system", "value": "Be brief."}, *TURNS]
    for more, defect in (({}, "messages_role_order"), ({"system_tag": "system"}, None)):
        folder = write(tmp_path, [row(talk)], columns=COLUMNS, tags={**tags, **more})
        assert [r.defect for r in declared(folder)] == [defect]
        assert (by_hand(folder)[0] is None) == (defect is None)
    said = [(turn["role"], turn["content"]) for turn in json.loads(declared(folder)[0].messages or "")]
    assert said == [("system", "Be brief."), ("user", "<image>What?"), ("assistant", "That.")]


@pytest.mark.parametrize("history", [[["question alone"]], "a text", [["q", 7]], [7]])
def test_a_history_that_is_not_pairs_is_refused(tmp_path: Path, history: Any) -> None:
    """Such pairs were left out without a word."""
    columns = {"prompt": "instruction", "response": "output", "history": "history", "images": "images"}
    told = {"instruction": "<image>What?", "output": "That.", "images": ["a.png"]}
    folder = write(tmp_path, [{**told, "history": history}, {**told, "history": None}], formatting="alpaca",
                   columns=columns)  # fmt: skip
    wrong, fine = by_hand(folder)
    assert wrong is not None and fine is None
    assert [r.defect for r in declared(folder)] == ["messages_unreadable", None]


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"ranking": True}, "sets `ranking`, which is for preference training"),
        ({"columns": {**COLUMNS, "chosen": "chosen", "rejected": "rejected"}}, "has the columns chosen and rejected"),
        ({"columns": {**COLUMNS, "kto_tags": "m"}}, "`columns` has no 'kto_tags', so that what it means would be "
                                                    "skipped. Did you mean 'kto_tag'? It has: messages, prompt"),
        ({"columns": COLUMNS, "tags": {"sytem_tag": "s"}}, "`tags` has no 'sytem_tag'"),
        ({"columns": COLUMNS, "num_sample": 3}, "'num_sample' is read by nothing. Did you mean 'num_samples'?"),
        ({"columns": {**COLUMNS, "system": "systm"}}, "reads 'system' from the column 'systm', which no row has"),
        ({"columns": {**COLUMNS, "tools": "toolz"}}, "reads 'tools' from the column 'toolz', which no row has"),
    ],
)  # fmt: skip
def test_a_name_that_would_be_skipped_is_refused(tmp_path: Path, entry: dict[str, Any], text: str) -> None:
    folder = write(tmp_path, [row()], **entry)
    for read in (lambda: list(rows_of_entry(folder, load_entry(folder, "mine"))), lambda: declared(folder)):
        with pytest.raises(DataError) as caught:
            read()
        assert text in str(caught.value)


def test_all_that_is_wrong_with_an_entry_is_said_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path, [row()], ranking=True, split="x", num_samples=3, columns={**COLUMNS, "kto": "m"})
    with pytest.raises(DataError) as caught:
        declared(folder)
    assert len(str(caught.value).splitlines()) == 4


TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
TALK = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "That."}]
PARTS = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
SHOWN = {**TALK[0], "content": PARTS}
TWICE = {**TALK[0], "content": "<image><image>"}
ALPACA_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "images": "images",
    "response": "output",
    "system": "system",
}
ALPACA = {"instruction": "What?", "input": "Now", "output": "That.", "images": "a.png", "system": "Be brief."}
OPENAI = {"formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}, "tags": TAGS}


def messages(*turns: dict[str, Any], **fields: Any) -> str:
    return json.dumps({"messages": list(turns), "images": ["a.png"], **fields})


# name -> (file's name and content, entry, whether it can be trained on)
DIRECTORY: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "lines_called_json": ("a.json", f"{messages(*TALK)}\n{messages(*TALK)}\n", OPENAI, True),
    "a_list_called_jsonl": ("b.jsonl", f"[\n{messages(*TALK)},\n{messages(*TALK)}]", OPENAI, True),
    "one_line_called_jsonl": ("c.jsonl", f"[{messages(*TALK)}, {messages(*TALK)}]", OPENAI, True),
    "a_mark_and_windows_ends": ("d.json", f"\ufeff[\r\n{messages(*TALK)}]\r\n", OPENAI, True),
    "not_a_number": ("e.json", f"[{messages(*TALK, score=float('nan'))}]", OPENAI, True),
    "a_csv": ("f.csv", 'instruction,output,images\n<image>What?,That.,a.png\n',
              {"columns": {"prompt": "instruction", "response": "output", "images": "images"}}, True),
    "alpaca": ("g.json", json.dumps([ALPACA]), {"columns": ALPACA_COLUMNS}, True),
    "alpaca_whose_images_nobody_reads": ("h.json", json.dumps([ALPACA]), {}, False),
    "parts_with_pictures": ("i.jsonl", json.dumps({"messages": [SHOWN, TALK[1]]}), OPENAI, True),
    "llava_with_text": ("j.json", json.dumps([{"id": "1", "image": "a.png", "conversations": TURNS},
                                              {"id": "2", "conversations": [{**TURNS[0], "value": "Hi"}, TURNS[1]]}]),
                        {"formatting": "sharegpt", "columns": {"messages": "conversations", "images": "image"}}, True),
    "no_placeholder": ("k.json", f"[{messages({**TALK[0], 'content': 'What?'}, TALK[1])}]", OPENAI, True),
    "the_answer_first": ("l.json", f"[{messages(TALK[1], *TALK)}]", OPENAI, False),
    "gone": ("m.json", f"[{messages(*TALK).replace('a.png', 'gone.png')}]", OPENAI, False),
    "too_many_placeholders": ("n.json", f"[{messages(TWICE, TALK[1])}]", OPENAI, False),
    "from_the_hub": ("o.json", "[]", {"hf_hub_url": "a/b"}, False),
}  # fmt: skip


def test_check_data_the_component_and_training_agree_on_every_entry(tmp_path: Path) -> None:
    """What one of them read, another refused, and images that an entry does not name were left out without a word."""
    (tmp_path / "a.png").write_bytes(png(1))
    info = {}
    for name, (file, content, entry, _) in DIRECTORY.items():
        (tmp_path / file).write_bytes(content.encode())
        info[name] = {"file_name": file, **entry}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    checked = {report.name: not report.problems for report in check_directory(tmp_path)}
    assert checked == {name: fine for name, (*_, fine) in DIRECTORY.items()}
    assert {name: trains(tmp_path, name) for name in DIRECTORY} == checked
    assert {name: ingests(tmp_path, name) for name in DIRECTORY} == checked


def trains(folder: Path, name: str) -> bool:
    try:
        return len(Dataset(folder).entry(name).rows) > 0
    except DataError:
        return False


def ingests(folder: Path, name: str) -> bool:
    try:
        rows = list(read_llamafactory(SourceSpec(kind="llamafactory", path=str(folder), split=name), folder))
    except DataError:
        return False
    return not any(r.defect or conversation_defect(r.messages or "[]", len(r.images), 10**4) for r in rows)


def test_pictures_are_relative_to_media_dir_and_absolute_ones_are_read_below_it(tmp_path: Path) -> None:
    photos, folder = tmp_path / "photos", tmp_path / "d"
    (photos / "sub").mkdir(parents=True)
    folder.mkdir()
    (photos / "sub" / "b.png").write_bytes(png(2))
    rows = [
        row(images=["sub/b.png"]),
        row(images=[str(photos / "sub" / "b.png")]),
        row(),
        row(images=["../secret.png"]),
    ]
    write(folder, rows, columns=COLUMNS)
    (tmp_path / "secret.png").write_bytes(png(3))
    entry = load_entry(folder, "mine")
    found = [(parsed, problems) for parsed, problems in parse_rows(folder, entry, photos)]
    assert [parsed and parsed.images[0] for parsed, _ in found] == [photos / "sub/b.png"] * 2 + [folder / "a.png", None]
    assert f"the path '../secret.png' leaves {photos} and {folder}" in found[3][1][0]
    without = by_hand(folder)
    assert "there is no image" in (without[0] or "") and "media_dir in the recipe" in (without[0] or "")
    assert "Name the folder that holds it: media_dir in the recipe" in (without[1] or "")
    [report] = check_directory(folder, photos)
    assert (report.num_images, len(report.problems)) == (2, 1)
    spec = SourceSpec(kind="llamafactory", path=str(folder), media_dir=str(photos))
    assert [r.defect for r in read_llamafactory(spec, folder)] == [None, None, None, "image_outside_root"]


def test_which_of_two_folders_holds_a_picture_is_part_of_an_entry_digest(tmp_path: Path) -> None:
    """By name alone two pictures that change places between the folders went unnoticed."""
    digests = []
    for number, names in enumerate((("a.png", "b.png"), ("b.png", "a.png"))):
        folder, photos = tmp_path / str(number) / "d", tmp_path / str(number) / "photos"
        folder.mkdir(parents=True)
        photos.mkdir()
        write(folder, [row(), row(images=["b.png"])], columns=COLUMNS)
        (folder / "a.png").unlink()
        (folder / names[0]).write_bytes(png(4))
        (photos / names[1]).write_bytes(png(5))
        digests.append(Dataset(folder, media_dir=photos).entry("mine").digest)
    assert digests[0] != digests[1]


@pytest.mark.parametrize("cell", ["data:image/png;base64,{}", "{}"], ids=["data URL", "base64"])
def test_an_embedded_picture_is_ingested_by_the_command_that_training_names(tmp_path: Path, cell: str) -> None:
    """Base64 was looked for as a file, and the message held all of it."""
    text = cell.format(base64.b64encode(png(6)).decode())
    folder = write(tmp_path, [row(images=[text]), row(images=["https://example.org/a.png"])], columns=COLUMNS)
    embedded, remote = by_hand(folder)
    assert f"mllm-assets add-dataset {folder} --entry mine" in (embedded or "") and len(embedded or "") < 400
    assert "is an address. Download it" in (remote or "")
    assert declared(folder)[0].images == (png(6),)
