"""The key table against the installed transformers, whose arguments LLaMA-Factory inherits."""

import dataclasses
from pathlib import Path

import pytest

from mllm_assets.recipe.keys import KEYS
from mllm_assets.recipe.spec import TrainSpec

pytestmark = pytest.mark.integration


def test_every_training_argument_of_transformers_is_known_with_its_default() -> None:
    from transformers import Seq2SeqTrainingArguments

    declared = dataclasses.fields(Seq2SeqTrainingArguments)
    assert [field.name for field in declared if field.name not in KEYS] == []
    differ = {
        field.name
        for field in declared
        if field.default is not dataclasses.MISSING and KEYS[field.name].default != field.default
    }
    assert differ == {"output_dir"}  # null there, and then "trainer_output", which is the default here


def test_transformers_accepts_what_the_spec_hands_over(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    spec = TrainSpec(
        model_name_or_path="m", dataset="d", template="gemma3", do_train=True, warmup_ratio=0.1, learning_rate=1e-4
    )
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **spec.training_arguments())
    assert arguments.get_warmup_steps(95) == 10  # ceil(95 * 0.1), as LLaMA-Factory's reference runs
    assert arguments.learning_rate == 1e-4
