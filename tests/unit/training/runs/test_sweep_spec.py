"""What a sweep may try: values and ranges of keys that decide about the weights, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_assets.errors import RecipeError
from mllm_assets.recipe.load import load_recipe
from mllm_assets.training.runs.sweep_spec import Range, SweepSpec, check_against

RECIPE = {
    "model_name_or_path": "pretrains/m", "dataset": "a_train", "eval_dataset": "a_val", "template": "gemma3",
    "eval_strategy": "steps", "eval_steps": 10, "max_steps": 100, "do_train": True,
}  # fmt: skip


def sweep(**parameters: Any) -> SweepSpec:
    return SweepSpec(parameters=parameters)


def test_numbers_are_what_yaml_means_by_them() -> None:
    """YAML 1.1 reads 1e-4 as a text."""
    tried = sweep(learning_rate=yaml.safe_load("{low: 1e-4, high: 0.01, log: true}"), lora_rank={"low": 4, "high": 16},
                  optim=["adamw_torch", "adafactor"], warmup_ratio=["1e-1", 0]).tried()  # fmt: skip
    assert tried == {
        "learning_rate": Range(low=1e-4, high=0.01, log=True),
        "lora_rank": Range(low=4, high=16),
        "optim": ["adamw_torch", "adafactor"],
        "warmup_ratio": [0.1, 0],
    }
    assert Range(low=4, high=16).is_whole and not Range(low=4, high=16.5).is_whole


@pytest.mark.attack("JSON")
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], "expected a list of different values"),
        ([1, 1], "expected a list of different values"),
        ([[1]], "a value in the list is a list itself"),
        (3, "3 is neither a list of values nor"),
        (None, "None is neither"),
        ({"low": 1}, "is neither a list"),
        ({"low": 1, "high": 2, "hihg": 3}, "is neither a list"),
        ({"low": "a", "high": 2}, "low is 'a', not a number"),
        ({"low": True, "high": 2}, "low is True, not a number"),
        ({"low": 0, "high": float("inf")}, "high is inf, not a number"),
        ({"low": float("nan"), "high": 1}, "low is nan, not a number"),
        ({"low": 2, "high": 1}, "low 2 is not below high 1"),
        ({"low": 0, "high": 1, "log": True}, "log: true needs a low above 0"),
        ({"low": 0.1, "high": 1, "log": "yes"}, "log is 'yes': expected true or false"),
        ({"low": 1, "high": 3, "step": 0}, "step is 0: expected more than 0"),
        ({"low": 1, "high": 3, "step": 0.5}, "expected a whole number, as low and high are"),
    ],
)
def test_what_is_neither_values_nor_a_range_is_refused_by_its_key(value: Any, expected: str) -> None:
    with pytest.raises(RecipeError, match="sweep: parameters.learning_rate: ") as caught:
        sweep(learning_rate=value)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"parameters": {}}, "parameters is empty"),
        ({"num_trials": 0}, "num_trials is 0"),
        ({"num_trials": 10**9}, "num_trials is 1000000000"),
        ({"max_hours": 0.0}, "max_hours is 0.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_sweep_of_nothing_is_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        SweepSpec(**{"parameters": {"seed": [1, 2]}, **values})


@pytest.mark.parametrize(
    ("parameters", "recipe", "expected"),
    [
        ({"learning_rat": [1e-4]}, {}, "unknown key 'learning_rat'. Did you mean"),
        ({"learning_rate": [1e-4, -1]}, {}, "sweep: parameters.learning_rate: override learning_rate=-1"),
        ({"logging_steps": [1, 2]}, {}, "parameters.logging_steps: it decides nothing about the weights"),
        (
            {"cutoff_len": [128, 256]},
            {},
            "with another cutoff_len the losses are not of the same",
        ),
        ({"model_name_or_path": ["pretrains/m", "pretrains/n"]}, {}, "all trials start from one model and one dataset"),
        ({"dataset": ["a_train", "b_train"]}, {}, "parameters.dataset: all trials start from one model"),
        (
            {"seed": [1, 2]},
            {"eval_dataset": "a_val,b_val", "eval_on_each_dataset": True},
            "Delete eval_on_each_dataset",
        ),
        ({"seed": [1, 2]}, {"eval_strategy": "no"}, "Set eval_dataset and eval_strategy: steps"),
        ({"seed": [1, 2]}, {"eval_dataset": None, "eval_strategy": "no"}, "Set eval_dataset"),
    ],
)
def test_what_no_trial_could_be_trained_with_is_said_before_the_first(
    tmp_path: Path, parameters: dict[str, Any], recipe: dict[str, Any], expected: str
) -> None:
    path = tmp_path / "r.yaml"
    values = {key: value for key, value in {**RECIPE, **recipe}.items() if value is not None}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError) as caught:
        check_against(SweepSpec(parameters=parameters), load_recipe(path))
    assert expected in str(caught.value)


def test_lists_that_fit_are_a_grid() -> None:
    assert SweepSpec(parameters={"a": [1, 2], "b": ["x"]}, num_trials=2).grid() == [
        {"a": 1, "b": "x"},
        {"a": 2, "b": "x"},
    ]
    assert SweepSpec(parameters={"a": [1, 2], "b": ["x", "y"]}, num_trials=3).grid() == []
    assert SweepSpec(parameters={"a": {"low": 1, "high": 2}}, num_trials=3).grid() == []


def test_objectives_bring_their_direction_and_the_first_decides() -> None:
    spec = SweepSpec(parameters={"seed": [1, 2]}, objectives=("eval_loss", "label_accuracy", "character_error_rate"))
    assert [(one.key, one.higher_is_better) for one in spec.compared_by] == [
        ("eval_loss", False),
        ("eval_label_accuracy", True),
        ("eval_character_error_rate", False),
    ]
    assert spec.asked == ("label_accuracy", "character_error_rate") and not spec.prunes
    assert [one.key for one in SweepSpec(parameters={"seed": [1, 2]}).compared_by] == ["eval_loss"]
    assert SweepSpec(parameters={"seed": [1, 2]}, objective="eval_anls").prunes


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"objective": "accuracy"}, "objective 'accuracy': expected one of eval_loss, label_accuracy, "),
        ({"objective": "perplexity"}, "objective 'perplexity': expected one of"),
        ({"objectives": ("anls", "eval_anls")}, "names one twice: anls, eval_anls. Leave it out."),
        ({"objective": "anls", "objectives": ("loss",)}, "objective and objectives are both set."),
    ],
)
def test_an_objective_that_cannot_be_compared_is_named(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        SweepSpec(parameters={"seed": [1, 2]}, **values)
    assert expected in str(caught.value)


def test_answers_are_not_compared_where_asking_was_not_tried(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "torch_compile": True}))
    check_against(SweepSpec(parameters={"seed": [1, 2]}), load_recipe(path))
    with pytest.raises(RecipeError, match="torch_compile together with the objective anls has not been tried"):
        check_against(SweepSpec(parameters={"seed": [1, 2]}, objective="anls"), load_recipe(path))
