"""What `mllm-assets summary` says where there is nothing to sum up."""

import shlex
from pathlib import Path

import pytest

from mllm_assets.artifacts import write_manifest
from mllm_assets.cli.summary import _losses, _samples, summarise
from mllm_assets.errors import IntegrityError, RecipeError
from mllm_assets.layout import Layout
from tests.unit.evaluation.made_predictions import predictions
from tests.unit.evaluation.test_side_by_side import evaluated


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "emoji_sft.yaml").touch()
    return Layout(tmp_path)


def test_a_missing_link_is_not_taken_for_a_model_that_was_never_trained(layout: Layout) -> None:
    run = layout.outputs / "emoji_sft" / "0123456789abcdef"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    with pytest.raises(
        IntegrityError, match=r"emoji_sft/latest is missing; finished runs: 0123456789abcdef\. To have it"
    ):
        summarise(layout, "emoji_sft")


def test_a_recipe_that_was_never_trained_says_the_command(layout: Layout) -> None:
    with pytest.raises(IntegrityError, match=r"was not trained .*mllm-assets run emoji_sft$"):
        summarise(layout, "emoji_sft")


def test_a_misspelt_recipe_gets_the_nearest_name_and_no_command_that_makes_everything(layout: Layout) -> None:
    with pytest.raises(RecipeError, match=r"No recipe is called 'emoji_stf'\. Did you mean 'emoji_sft'\?"):
        summarise(layout, "emoji_stf")


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        (['{"loss": 2.0}', '{"loss": 1.0}'], "  loss curve  2.000 █▁ 1.000"),
        (['{"loss": 0.01, "reward": 0.25}', '{"loss": -0.01, "reward": 0.75}'], "  reward      0.250 ▁█ 0.750"),
    ],
)
def test_a_run_that_learnt_rewards_shows_them_and_not_its_loss_which_says_nothing(
    tmp_path: Path, lines: list[str], shown: str
) -> None:
    steps = [f'{{"current_steps": {step}, {line[1:]}' for step, line in enumerate(lines, 1)]
    (tmp_path / "trainer_log.jsonl").write_text("\n".join(steps) + "\n")
    assert _losses(tmp_path, {"num_steps": 2, "train_wall_s": 1.0, "samples_per_s": 8.0})[1:] == [shown]


def test_the_first_question_is_one_that_the_model_answered_rightly_and_a_wrong_answer_is_shown_as_such(
    layout: Layout,
) -> None:
    """It was the first row of the data, which the demo's model answered wrongly as its first word to a new user."""
    evaluated(layout.root, "aaaa", predictions(), metrics={"entries": {}})
    facts = {"num_steps": 4, "train_wall_s": 1.0, "samples_per_s": 8.0, "data_digests": {}, "weights_digest": "aaaa"}
    write_manifest(layout.outputs / "mine" / "aaaa", {"recipe": {"dataset_dir": "data"}, **facts})
    layout.data.mkdir()
    layout.dataset_info.write_text("{}")
    right, _, wrong = summarise(layout, "mine/aaaa").partition("Try it:")[2].partition("It fails on:")
    command, said = right.strip().split("\n" + " " * 14 + "when it was evaluated it said ")
    assert shlex.split(command.replace("\\\n", ""))[-4:] == [
        "--image",
        str(layout.data / "images" / "0.png"),
        "--prompt",
        "Which animal?",
    ]
    assert said == "'cat'" and "images/5.png" in wrong and "it said 'cow', but right is 'horse'" in wrong


@pytest.mark.parametrize(
    ("num_test", "source", "is_said"),
    [(0, {}, True), (2, {}, False), (0, {"val_split": "v"}, False)],
)
def test_figures_without_a_test_split_say_how_to_get_one(
    layout: Layout, num_test: int, source: dict[str, str], is_said: bool
) -> None:
    (layout.data / "birds").mkdir(parents=True)
    (layout.data / "dataset_info.json").write_text('{"birds_train": {"file_name": "birds/train.json"}}')
    counts = {"num_raw": 12, "num_train": 10, "num_val": 2, "num_test": num_test, "num_unused": 0, "num_rejected": 0}
    write_manifest(layout.data / "birds", {**counts, "spec": {"source": source}})
    said = _samples(layout, {"recipe": {"dataset_dir": "data"}, "data_digests": {"birds_train": "d"}})
    assert ["no test split: `num_test: 2` below `split:`" in line for line in said[1:]] == [True] * is_said
