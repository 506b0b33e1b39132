"""Record what LLaMA-Factory makes of rows with tools: their messages, token ids and labels in each family's turns.

    python -m tests.golden.record_tools PYTHON_OF_AN_ENVIRONMENT_WITH_LLAMAFACTORY_0.9.5

as record_families.py does, into tests/golden/tools.json.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.golden import record_families

GOLDEN = Path(__file__).with_name("tools.json")
GEMMA3 = Path(__file__).with_name("parity") / "model"
TEMPLATES = {"gemma3": ["gemma3"], **record_families.TEMPLATES}
ENTRY = {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system", "tools": "tools"}}
OPENAI = {
    "formatting": "openai",
    "columns": {"messages": "messages", "tools": "tools"},
    "tags": {
        "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
        "observation_tag": "tool", "function_tag": "function_call", "system_tag": "system",
    },
}  # fmt: skip
ZOOM = {
    "name": "zoom",
    "description": "Enlarge a part.",
    "parameters": {
        "type": "object",
        "properties": {
            "box": {"type": "array", "description": "Corners", "items": {"type": "number"}},
            "how": {"type": "string", "enum": ["fine", "coarse"]},
            "note": {"type": "string", "description": "Why, über all"},
        },
        "required": ["box"],
    },
    "response": {"type": "object", "description": "The part"},
}
COUNT = {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}}
CALL = '{"name": "zoom", "arguments": {"how": "fine", "box": [1, 2.5, {"b": null, "a": true}], "note": "ä"}}'


def said(*texts: str) -> list[dict[str, str]]:
    """Turns; a text's role is before its first `:`."""
    return [dict(zip(("from", "value"), text.split(":", 1), strict=True)) for text in texts]


ROWS: list[dict[str, Any]] = [
    {"conversations": said("human:What is left?", f"function_call:{CALL}", "observation:A cat.", "gpt:A cat, I see."),
     "tools": json.dumps([ZOOM, COUNT]), "system": "Be brief."},
    {"conversations": said("human:How many?", f'function_call:[{CALL}, {{"name": "count", "arguments": {{}}}}]'),
     "tools": json.dumps([COUNT]), "system": ""},
    {"conversations": said("human:1 + 1?", "gpt:2", "human:Zoom", f"function_call:<think>\nHm.\n</think>\n\n{CALL}"),
     "tools": "[]", "system": ""},
    {"conversations": said("human:Look", f"function_call:I look. <tool_call>{CALL}</tool_call>", "observation:{}",
                           f"function_call:{CALL}"), "tools": "", "system": "Be brief."},
]  # fmt: skip
OPENAI_ROWS: list[dict[str, Any]] = [
    {"messages": [
        {"role": "user", "content": "Compare"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "zoom", "arguments": '{"box": [1]}'}},
            {"id": "2", "type": "function", "function": {"name": "count", "arguments": {}}},
        ]},
        {"role": "tool", "content": "A cat."}, {"role": "tool", "content": "Two."},
        {"role": "assistant", "content": "Two cats."},
     ], "tools": [ZOOM, COUNT]},
]  # fmt: skip


def main() -> None:
    from tests import tiny_families

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for model_type in TEMPLATES:
            if model_type == "gemma3":
                shutil.copytree(GEMMA3, root / model_type)
            else:
                (root / model_type).mkdir()
                tiny_families.build(model_type, root / model_type)
        command = [sys.argv[1], "-m", "tests.golden.record_tools", "--there", str(root)]
        subprocess.run(command, check=True)
        GOLDEN.write_bytes((root / "tools.json").read_bytes())


def record_there(root: Path) -> None:
    """Run inside LLaMA-Factory's environment."""
    record_families.without_torchaudio()
    from importlib.metadata import version

    found: dict[str, Any] = {
        "llamafactory": version("llamafactory"),
        "openai": _converted(OPENAI, OPENAI_ROWS),
        "rows": {},
    }
    for model_type, templates in TEMPLATES.items():
        for template in templates:
            found["rows"][template] = _encoded(root / model_type, template)
    (root / "tools.json").write_text(json.dumps(found, sort_keys=True) + "\n")


def _converted(entry: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.hparams import DataArguments

    attributes = DatasetAttr("file", dataset_name="rows")
    attributes.join(entry)
    converter = get_dataset_converter(entry["formatting"], attributes, DataArguments(template="qwen2_vl"))
    return [converter(row) for row in rows]


def _encoded(directory: Path, template_name: str) -> list[dict[str, Any]]:
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="right")
    arguments = DataArguments(template=template_name, cutoff_len=8192)
    template = get_template_and_fix_tokenizer(tokenizer, arguments)
    processor = record_families.read_processor(directory, tokenizer)
    processor.full_image_sequence = ""  # Gemma 3's, of which there is none in these rows
    encoder = SupervisedDatasetProcessor(template, tokenizer, processor, arguments)
    rows = []
    for row in _converted(ENTRY, ROWS):
        told = (row["_prompt"], row["_response"], row["_system"], row["_tools"])
        try:
            input_ids, labels = encoder._encode_data_example(*told, [], [], [])
            rows.append({"input_ids": input_ids, "labels": labels})
        except RuntimeError as error:
            rows.append({"error": str(error)})
    return rows


if __name__ == "__main__":
    if sys.argv[1] == "--there":
        record_there(Path(sys.argv[2]))
    else:
        main()
