"""How a run that was not evaluated is evaluated."""

import json
import shlex
from pathlib import Path

from mllm_assets.artifacts import write_manifest
from mllm_assets.components.checkpoint_asset import CheckpointConfig
from mllm_assets.evaluation.evaluated import LAUNCHPAD, how_to_evaluate
from mllm_assets.layout import Layout
from mllm_assets.training.recipe import load_recipe

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
    assert "--assets '+key:\"mine/eval_metrics\"' (it takes this run" in advice(tmp_path, "logging_steps=7")


def test_a_run_by_an_override_is_evaluated_with_the_same_in_the_launch(tmp_path: Path) -> None:
    """The command trained the recipe as it is written, and evaluated that."""
    said = advice(tmp_path, "max_steps=4", "learning_rate=0.001")
    words = shlex.split(said)
    assert words[words.index("--assets") + 1] == '+key:"mine/eval_metrics"'
    assert json.loads(words[words.index("--config-json") + 1]) == {
        "ops": {"mine__checkpoint": {"config": {"max_steps": 4, "learning_rate": 0.001}}}
    }


def test_a_run_by_an_override_that_no_launch_can_say_names_what_the_recipe_must_say(tmp_path: Path) -> None:
    said = advice(tmp_path, "max_steps=4", "freeze_language_model=true")
    assert "`mllm-assets evaluate outputs/mine/0123456789abcdef` scores its checkpoints" in said
    assert "with max_steps: 4, freeze_language_model: true in there" in said or (
        "with freeze_language_model: true, max_steps: 4 in there" in said
    )


def test_what_a_launch_can_say_is_what_the_launchpad_offers() -> None:
    assert set(CheckpointConfig.model_fields) - {"force"} == LAUNCHPAD
