"""How a run that was not evaluated is evaluated."""

import json
import os
import shlex
from pathlib import Path

import pytest

from mllm_assets.artifacts import write_manifest
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.metrics import write_metrics
from mllm_assets.evaluation.run_lookup import evaluated_runs, find_run, how_to_evaluate
from mllm_assets.layout import Layout
from mllm_assets.recipe.load import load_recipe

RECIPE = """stage: sft
do_train: true
finetuning_type: full
model_name_or_path: pretrains/gemma3_tiny
dataset: emoji_train
template: gemma3
output_dir: outputs/mine
max_steps: 400
"""


def advice(root: Path, *overrides: str) -> str:
    recipe = root / "configs" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text(RECIPE)
    run_dir = root / "outputs" / "mine" / "0123456789abcdef"
    run_dir.mkdir(parents=True)
    write_manifest(run_dir, {"recipe": load_recipe(recipe, overrides).spec.to_dict()})
    return how_to_evaluate(Layout(root), run_dir)


def test_a_run_of_the_recipe_as_it_is_written_needs_no_more_than_its_asset(tmp_path: Path) -> None:
    assert "mllm-assets run mine/eval_metrics (it takes this run" in advice(tmp_path, "logging_steps=7")


def test_a_run_by_an_override_is_evaluated_with_the_same_in_the_launch(tmp_path: Path) -> None:
    """The command trained the recipe as it is written, and evaluated that."""
    words = shlex.split(advice(tmp_path, "max_steps=4", "freeze_language_model=true"))
    run = words[words.index("mllm-assets") :]
    assert run[:3] == ["mllm-assets", "run", "mine/eval_metrics"]
    assert set(run[3:5]) == {"max_steps=4", "freeze_language_model=true"}


def test_a_run_that_is_not_finished_is_told_how_it_goes_on(tmp_path: Path) -> None:
    """`compare` and `summary` said that no recipe had its name."""
    recipe, run_dir = tmp_path / "configs" / "mine.yaml", tmp_path / "outputs" / "mine" / "0123456789abcdef"
    recipe.parent.mkdir()
    recipe.write_text(RECIPE)
    run_dir.mkdir(parents=True)
    values = load_recipe(recipe, ["max_steps=4"]).spec.to_dict()
    for kept in ({"overrides": {"max_steps": 4}}, {"starts_from": {"recipe": values}}):
        (run_dir / "run.json").write_text(json.dumps(kept))
        for name in ("mine/0123456789abcdef", str(run_dir)):
            with pytest.raises(IntegrityError, match="cdef is not finished.*: mllm-assets run mine max_steps=4"):
                find_run(Layout(tmp_path), name)


def test_the_last_evaluation_is_the_last_one_also_where_the_clock_was_set_back_before_it(tmp_path: Path) -> None:
    """By the times of their files the one before it counted as the last, and the summary showed its figures."""
    parent = tmp_path / "outputs" / "mine"
    for number, name in enumerate(("before", "after")):
        (parent / name).mkdir(parents=True)
        write_manifest(parent / name, {"weights_digest": name})
        metrics_dir = parent / "eval_metrics" / name
        write_metrics(metrics_dir, {}, {"weights_digest": name})
        os.utime(metrics_dir / "manifest.json", (2e9 - number * 86400,) * 2)
    assert [run.run_dir.name for run in evaluated_runs(Layout(tmp_path), "mine")] == ["after", "before"]
