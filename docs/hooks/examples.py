"""LLaMA-Factory's own example recipes with pictures, and whether each runs here: a page made by loading them."""

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from mllm_assets.errors import MllmAssetsError
from mllm_assets.recipe.load import load_recipe

RECORDED = Path(__file__).parents[2] / "tests" / "golden" / "llamafactory_examples.json"
INTRODUCTION = """# LLaMA-Factory's examples

The recipes of LLaMA-Factory 0.9.5's `examples/` that train a vision-language model by `stage: sft`, `dpo`, `kto` or
`rm`, read here with another `model_name_or_path` alone. There is none of `kto` or `rm` with pictures.
Which keys have no effect and why, or what to write instead, is below. The recipes of `ascend` are read, but mixtures of
experts are not among the [models](../models.md) that were tried."""


def verdict(values: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a recipe is read, and what is said about its keys."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump({**values, "model_name_or_path": "pretrains/tiny"}, sort_keys=False))
        try:
            return True, list(load_recipe(path).notes)
        except MllmAssetsError as error:
            return False, [line.replace(f"{path}:", "line ") for line in str(error).splitlines()]


def examples() -> str:
    """The page."""
    recorded: dict[str, dict[str, Any]] = json.loads(RECORDED.read_text(encoding="utf-8"))
    verdicts = {name: verdict(values) for name, values in recorded.items()}
    lines = [INTRODUCTION, "", "| recipe | stage | method | |", "|---|---|---|---|"]
    for name, (is_read, _) in verdicts.items():
        values = recorded[name]
        told = "read" if is_read else "refused"
        lines.append(f"| `{name}` | {values['stage']} | {values['finetuning_type']} | {told} |")
    for name, (_, notes) in verdicts.items():
        lines += ["", f"## {name}", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"
