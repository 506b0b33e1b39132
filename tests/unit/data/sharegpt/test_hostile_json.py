"""ShareGPT files as strangers write them: read, or refused with the file and the row, never anything else."""

import json
import re
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mllm_assets.data.sharegpt import json_text
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.json_text import JsonLimits, decode, json_lines, list_items, read_text
from mllm_assets.errors import DataError
from tests.unit.data.made_datasets import png
from tests.unit.data.sharegpt.test_rows import ENTRY, failing, row, write

pytestmark = pytest.mark.not_fast

TRAILING_COMMA = (  # Python 3.13 has a message of its own
    "line 1, column 4: Illegal trailing comma before end of array"
    if sys.version_info >= (3, 13)
    else "line 1, column 5: Expecting value"
)
TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["<image>", "<image><image>x", "", "<end_of_turn>", "\ud800", "\x00", "../x", "images/a.png", "/etc/passwd"]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
ROLES = st.sampled_from(["user", "assistant", "system", "human", "", None, 1])
MESSAGES = st.lists(
    st.one_of(st.fixed_dictionaries({"role": ROLES, "content": st.one_of(TEXTS, VALUES)}), VALUES), max_size=4
)
NEARLY_ROWS = st.fixed_dictionaries(
    {"messages": st.one_of(MESSAGES, VALUES), "images": st.one_of(st.lists(TEXTS, max_size=2), VALUES)},
    optional={"id": VALUES, "label": VALUES, "system": VALUES},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fuzzed"), [])


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(values=st.lists(st.one_of(NEARLY_ROWS, st.just(row()), VALUES), min_size=1, max_size=3))
def test_any_rows_are_read_or_refused_by_row(folder: Path, values: list[Any]) -> None:
    (folder / "rows.json").write_text(json.dumps(values))
    try:
        rows = Dataset(folder).entry("rows").rows
    except DataError as error:
        assert "rows.json" in str(error)
        return
    assert len(rows) == len(values)
    for read in rows:
        assert all(message.content.encode() is not None for message in read.messages)
        assert all(image.is_relative_to(folder) for image in read.images)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(content=st.one_of(st.binary(max_size=60), st.text(alphabet='[]{}",:0123456789.eE+-\\u truefalsn', max_size=60)))
def test_any_bytes_are_read_or_refused_by_file(folder: Path, content: bytes | str) -> None:
    (folder / "rows.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match="rows.json"):
        Dataset(folder).entry("rows").read()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(values=st.lists(VALUES, max_size=4), indent=st.sampled_from([None, 2]), chunk_chars=st.integers(1, 40))
@example(values=[1.5, -1e-7, 10], indent=None, chunk_chars=1)
def test_a_list_that_is_read_in_parts_holds_what_the_whole_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any], indent: int | None, chunk_chars: int
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(values, indent=indent), encoding="utf-8")
    monkeypatch.setattr(json_text, "CHUNK_CHARS", chunk_chars)
    try:
        whole = decode(path.read_text(encoding="utf-8"), path, 1)
    except DataError as error:
        with pytest.raises(DataError, match=re.escape(str(error))):
            list(list_items(path))
    else:
        assert list(list_items(path)) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{},]", TRAILING_COMMA),
        ("[{}] []", "line 1, column 6: Extra data"),
        ("[{}\n{}]", "line 2, column 1: Expecting ',' delimiter"),
        ("[1", "line 1, column 3: Expecting ',' delimiter"),
        ('{"a": 1}', "expected a list of rows, got dict"),
    ],
)
def test_a_list_that_breaks_off_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        list(list_items(tmp_path / "rows.json"))


def test_a_long_list_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row()] * 20_000, indent=2))
    tracemalloc.start()
    try:
        assert sum(1 for _ in list_items(path)) == 20_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": "a", "messages": [], "id": "b"}]', "line 1: the key 'id' is there twice in one object"),
        ('[{"n": ' + "9" * 5000 + "}]", "Shorten the number"),
        ("", "line 1, column 1: Expecting value"),
    ],
)
def test_what_readers_disagree_on_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in failing(tmp_path, text)


def test_half_a_character_is_refused_by_message(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "a \ud83d"}]
    message = failing(tmp_path, [row(id="r1", messages=turns)])
    assert "row 0 (r1), message 1: the text holds half of a character (a lone surrogate) at position 2" in message


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_byte_order_mark_is_skipped(tmp_path: Path, name: str) -> None:
    write(tmp_path, [], {**ENTRY, "file_name": name})
    content = json.dumps([row()] if name == "rows.json" else row())
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert len(Dataset(tmp_path).entry("rows").rows) == 1


@pytest.mark.parametrize("name", ["a\x00.png", "a" * 5000, "circle.png", "\ud800.png"])
def test_what_is_no_path_is_refused_by_row(tmp_path: Path, name: str) -> None:
    (tmp_path / "circle.png").symlink_to("circle.png")
    message = failing(tmp_path, [row(images=[name])])
    assert "rows.json, row 0" in message


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.png", "images/../../outside.png"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside.png").write_bytes(png(1))
    folder = tmp_path / "data"
    folder.mkdir()
    assert "leaves" in failing(folder, [row(images=[name])])


def test_a_file_above_its_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[" + " " * 2000 + "]")
    with pytest.raises(DataError, match=r"has 2,002 bytes, expected at most 1,000 .*Write its rows as \.jsonl"):
        read_text(path, JsonLimits(max_file_bytes=1000))


def test_a_line_far_too_long_costs_this_line_in_little_memory(tmp_path: Path) -> None:
    """The file is sparse: it has the size and takes no disk."""
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"messages": "')
        file.truncate(2**26)
        file.seek(0, 2)
        file.write(b'\n\n{"after": 1}\n')
    tracemalloc.start()
    try:
        too_long, after = json_lines(path, JsonLimits(max_line_bytes=2**20))
        assert "rows.jsonl, line 1: longer than 1,048,576 bytes" in (too_long.problem or "")
        assert (after.number, after.value, after.problem) == (3, {"after": 1}, None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**26 / 8


def test_a_gigabyte_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(DataError, match=r"has 1,073,741,824 bytes, expected at most 536,870,912"):
        read_text(path)


def test_an_object_without_a_key_twice_keeps_its_order(tmp_path: Path) -> None:
    assert list(decode('{"b": 1, "a": {"b": 2}}', tmp_path, 1)) == ["b", "a"]
