"""Rows with tools become LLaMA-Factory's messages, token ids and labels, in every family's turns."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.data.sharegpt.entries import load_entry
from mllm_assets.data.sharegpt.parsing import parse_rows
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import DataError
from mllm_assets.families.family import TEMPLATES
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.training.encoding.encode import Encoder
from mllm_assets.training.models.load import load_processor
from tests import tiny_families
from tests.golden.record_tools import CALL, ENTRY, GEMMA3, GOLDEN, OPENAI, OPENAI_ROWS, ROWS, said
from tests.golden.record_tools import TEMPLATES as RECORDED_TEMPLATES

RECORDED = json.loads(GOLDEN.read_text(encoding="utf-8"))
MODEL_OF = {name: model for model, names in RECORDED_TEMPLATES.items() for name in names}
PLAIN = {"conversations": said("human:?", "gpt:!"), "system": "", "tools": ""}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def processor_of(models: Path, model_type: str) -> Any:
    directory = models / model_type
    if not directory.exists():
        if model_type == "gemma3":
            shutil.copytree(GEMMA3, directory)
        else:
            directory.mkdir()
            tiny_families.build(model_type, directory)
    return load_processor(directory)


def read(folder: Path, entry: dict[str, Any], rows: list[dict[str, Any]]) -> list[Row]:
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json", **entry}}))
    found = list(parse_rows(folder, load_entry(folder, "rows")))
    assert not [problems for _, problems in found if problems]
    return [row for row, _ in found if row is not None]


@pytest.mark.parametrize("template", RECORDED["rows"])
def test_token_ids_and_labels_of_rows_with_tools_equal_llamafactorys(
    models: Path, tmp_path: Path, template: str
) -> None:
    """A call and its result, two calls at once, reasoning before a call, `<tool_call>` inside a text, an empty list."""
    encoder = Encoder(processor_of(models, MODEL_OF[template]), TurnSettings(template=template, cutoff_len=8192))
    for row, expected in zip(read(tmp_path, ENTRY, ROWS), RECORDED["rows"][template], strict=True):
        refused = "expected a call as JSON" if "error" in expected else None
        if template in ("qwen3_vl_nothink", "qwen3_5_nothink") and "<think>" in row.messages[-1].content:
            refused = "holds '<think>'"  # a control token of these turns, as everywhere in texts
        if refused:
            with pytest.raises(DataError, match=refused):
                encoder.encode(row)
            continue
        encoded = encoder.encode(row)
        assert list(encoded.input_ids) == expected["input_ids"], row.id
        assert list(encoded.labels) == expected["labels"], row.id


def test_openais_calls_and_results_are_read_as_llamafactory_reads_them(tmp_path: Path) -> None:
    for row, expected in zip(read(tmp_path, OPENAI, OPENAI_ROWS), RECORDED["openai"], strict=True):
        told = [{"role": message.role, "content": message.content} for message in row.messages]
        assert told == [*expected["_prompt"], *expected["_response"]]
        assert row.tools == expected["_tools"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"tools": "zoom"}, "its tools are not JSON"),
        ({"tools": '{"name": "zoom"}'}, "should be a list of functions"),
        ({"tools": '[{"description": "no name"}]'}, "its tools lack"),
        ({"tools": '["<end_of_turn>"]'}, "the text of its tools holds '<end_of_turn>'"),
        ({"conversations": said("human:?", "function_call:zoom(1)")}, "expected a call as JSON"),
        ({"conversations": said("human:?", 'function_call:{"name": "zoom"}')}, "expected a call as JSON"),
    ],
)
def test_what_is_no_tool_or_call_is_refused_by_row(models: Path, tmp_path: Path, row: Any, text: str) -> None:
    [read_row] = read(tmp_path, ENTRY, [{**PLAIN, **row}])
    encoder = Encoder(processor_of(models, "gemma3"), TurnSettings(template="gemma3"))
    with pytest.raises(DataError, match="Row rows") as caught:
        encoder.encode(read_row)
    assert text in str(caught.value)


def test_a_family_without_a_format_of_tools_refuses_them(models: Path, tmp_path: Path) -> None:
    """SmolVLM is none of LLaMA-Factory's: what its tools would look like is said nowhere."""
    encoder = Encoder(processor_of(models, "smolvlm"), TurnSettings(template="smolvlm"))
    calls, plain = read(tmp_path, ENTRY, [{**PLAIN, "conversations": said("human:?", f"function_call:{CALL}")}, PLAIN])
    with pytest.raises(DataError, match="has tools, and LLaMA-Factory has no format"):
        encoder.encode(calls)
    assert encoder.encode(plain).num_supervised
    assert [name for name, template in TEMPLATES.items() if template.tools is None] == ["smolvlm", "auto"]
