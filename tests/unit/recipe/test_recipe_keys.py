"""The key table against what the released packages declare."""

import dataclasses
import inspect
import json
import re
import runpy
from pathlib import Path

from mllm_assets.recipe.keys import ALIASES, KEYS
from mllm_assets.recipe.spec import TrainSpec

DECLARED = json.loads((Path(__file__).parents[2] / "golden" / "llamafactory_keys.json").read_text())


def test_every_key_of_the_released_llamafactory_is_known() -> None:
    assert len(DECLARED) > 200
    assert [name for name in DECLARED if name not in KEYS] == []


def test_every_default_is_the_released_one() -> None:
    """A default that differs would train something else than the same recipe does in LLaMA-Factory."""
    ours_differ = {
        name: (KEYS[name].default, declared["default"])
        for name, declared in DECLARED.items()
        if declared["is_literal"] and KEYS[name].default != declared["default"]
    }
    # Required here, null there: LLaMA-Factory refuses a training recipe without the first two as well, and reads the
    # chat template from the tokenizer without the third
    assert set(ours_differ) == {"model_name_or_path", "dataset", "template"}


def test_a_key_that_does_nothing_says_why_and_a_refused_one_what_to_do() -> None:
    steps = ("Delete", "Set ", "Use ", "Name ", "Put ", "Move ")
    for name, key in KEYS.items():
        if key.status != "supported":
            assert key.note.endswith(".") and len(key.note) > 20, name
        if key.status == "refused":
            assert any(step in key.note for step in steps), name


def test_aliases_lead_to_supported_keys() -> None:
    assert {KEYS[alias.name].status for alias in ALIASES.values()} == {"supported"}
    assert not set(ALIASES) & set(KEYS)


def test_every_field_says_what_it_is_for() -> None:
    """A field without a scope would silently be left out of the run's name."""
    scopes = {field.name: field.metadata.get("scope") for field in dataclasses.fields(TrainSpec)}
    assert set(scopes.values()) == {"semantic", "selection", "operational"}


def test_every_supported_key_is_read_by_the_code() -> None:
    """A key that nobody reads would be accepted and do nothing."""
    package = Path(__file__).parents[3] / "mllm_assets"
    source = "".join(path.read_text() for path in package.rglob("*.py")).replace(inspect.getsource(TrainSpec), "")
    read_in_spec = {"dataset", "eval_dataset", "template", "do_train", "packing", "warmup_ratio"}
    unread = {
        field.name
        for field in dataclasses.fields(TrainSpec)
        if not field.metadata["hf"] and not re.search(rf"\.{field.name}\b", source)
    }
    assert unread <= read_in_spec


def test_every_supported_key_has_a_sentence_in_the_reference() -> None:
    """The table had names, types and defaults, and who did not know a key already learnt nothing."""
    sentences = runpy.run_path(str(Path(__file__).parents[3] / "docs/hooks/recipe_keys.py"))["KEY_SENTENCES"]
    assert [name for name, key in KEYS.items() if key.status == "supported" and name not in sentences] == []
