"""What `mllm-assets summary` says where there is nothing to sum up."""

from pathlib import Path

import pytest

from mllm_assets.cli.summary import summarise
from mllm_assets.errors import IntegrityError, RecipeError
from mllm_assets.layout import Layout


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
