"""What is read at once is what is read piece by piece."""

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.data.sharegpt.entries import load_entry
from mllm_assets.data.sharegpt.media import Pictured, media_folders
from mllm_assets.data.sharegpt.parsing import RowParser
from mllm_assets.data.sharegpt.row_files import FileRow
from mllm_assets.data.sharegpt.rows import Row, parse_row
from tests.unit.data.made_datasets import png

COLUMNS = {"messages": "turns", "images": "images", "system": "system", "tools": "tools"}
TEXTS = ("What?", "<image>What?", "<image><image>é", "half \ud83d of one", "<img>a.png</img>a cat", "", None, ["a"])
ANSWERS = ("That.", "a <image>", "1 < 2", {"text": "x"})
IMAGES = (["a.png"], ["a.png", "b.png"], [], None, "a.png", ["gone.png"], ["../a.png"], [3], "['a.png']", ["A.PNG"])
OTHERS: tuple[Mapping[str, Any], ...] = (
    {}, {"id": "one", "label": "cat"}, {"id": 7}, {"system": "Be brief."}, {"tools": "[]"}, {"tools": "f"},
)  # fmt: skip


def both(folder: Path, value: Any, **entry: Any) -> tuple[Any, Any]:
    """What is read at once, and piece by piece: the row and its problems."""
    block = {"file_name": "rows.json", "formatting": "sharegpt", "columns": COLUMNS, **entry}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": block}))
    info = load_entry(folder, "rows")
    row, problems = FileRow(folder / "rows.json", "row 3", value), []
    slow = parse_row(row, 3, info, Pictured(folder, None, media_folders(folder, None)), problems)
    return RowParser(info, Pictured(folder, None, media_folders(folder, None)))(row, 3), (slow, problems)


def turns(*texts: Any, role: str = "from", content: str = "value", **more: Any) -> list[dict[str, Any]]:
    return [{role: ("human", "gpt")[at % 2], content: text, **more} for at, text in enumerate(texts)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(1))
    return tmp_path


def test_texts_and_pictures_are_read_as_piece_by_piece(folder: Path) -> None:
    num_rows = 0
    for question, answer, images, other in product(TEXTS, ANSWERS, IMAGES, OTHERS):
        fast, slow = both(folder, {"turns": turns(question, answer), "images": images, **other})
        assert fast == slow, (question, answer, images, other)
        num_rows += isinstance(fast[0], Row)
    assert num_rows > 200


@pytest.mark.parametrize(
    "value",
    [
        "text", {}, {"turns": []}, {"turns": "none"}, {"turns": turns("a")}, {"turns": turns("a", "b", "c", "d")},
        {"turns": turns("a", "b")[::-1]}, {"turns": [*turns("a"), "b"]}, {"turns": turns("a", "b", tool_calls=[1])},
        {"turns": [{"from": "system", "value": "Be brief."}, *turns("a", "b")]}, {"turns": turns("a", "b", role="by")},
        {"turns": turns("a", "b", content="said")},
    ],
)  # fmt: skip
def test_turns_are_read_as_piece_by_piece(folder: Path, value: Any) -> None:
    fast, slow = both(folder, value)
    assert fast == slow


@pytest.mark.parametrize(
    "entry",
    [
        {"tags": {"user_tag": "gpt", "assistant_tag": "human"}},
        {"tags": {"system_tag": "human"}},
        {"tags": {"role_tag": "from"}},
        {"columns": {"messages": "turns", "kto_tag": "good"}},
        {"columns": {"messages": "turns", "rejected": "bad", "chosen": "good"}, "ranking": True},
        {"formatting": "alpaca", "columns": {"prompt": "turns"}},
        {"formatting": "openai"},
        {"columns": {"messages": "turns"}},
    ],
)
@pytest.mark.parametrize("other", [{}, {"good": True, "bad": {"from": "gpt", "value": "no"}}, {"good": False}])
def test_every_entry_is_read_as_piece_by_piece(folder: Path, entry: dict[str, Any], other: dict[str, Any]) -> None:
    for texts in (("a", "b"), ("a", "b", "c", "d")):
        fast, slow = both(folder, {"turns": turns(*texts), **other}, **entry)
        assert fast == slow


def test_a_row_as_nearly_all_are_is_read_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_assets.data.sharegpt.parsing.parse_row", lambda *_: None)
    fast, slow = both(folder, {"turns": turns("<image>a", "é"), "images": ["a.png"]})
    assert fast == slow and fast[0].images == (folder / "a.png",)
