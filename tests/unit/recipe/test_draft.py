"""A recipe from a few choices is one that a run takes."""

from dataclasses import replace
from pathlib import Path

import pytest

from mllm_assets.errors import RecipeError
from mllm_assets.recipe.draft import METHODS, RecipeDraft, read_draft, renamed, write_draft

DRAFT = RecipeDraft(
    name="My try", model="pretrains/tiny", template="gemma3", entry="emoji_train", eval_entry="emoji_val"
)


@pytest.mark.parametrize("method", METHODS)
def test_each_choice_of_what_trains_is_a_recipe_without_a_note(method: str) -> None:
    recipe = read_draft(DRAFT.name, replace(DRAFT, method=method).to_yaml())
    assert recipe.notes == () and recipe.name == "my_try"
    assert recipe.spec.train_entries == ("emoji_train",) and recipe.spec.eval_entries == ("emoji_val",)


def test_epochs_are_trained_instead_of_steps() -> None:
    recipe = read_draft(DRAFT.name, replace(DRAFT, epochs=2.5).to_yaml())
    assert recipe.notes == () and recipe.spec.num_train_epochs == 2.5 and recipe.spec.max_steps == -1
    assert (recipe.spec.save_strategy, recipe.spec.eval_strategy) == ("epoch", "epoch")


def test_another_recipe_is_not_overwritten(tmp_path: Path) -> None:
    path = write_draft(tmp_path, DRAFT.name, DRAFT.to_yaml())
    assert path == tmp_path / "configs" / "my_try.yaml" == write_draft(tmp_path, DRAFT.name, DRAFT.to_yaml())
    with pytest.raises(RecipeError, match="exists and says something else"):
        write_draft(tmp_path, DRAFT.name, replace(DRAFT, seed=7).to_yaml())


def test_a_recipe_of_several_entries_is_renamed_and_all_else_stays() -> None:
    """Another name wrote the draft anew, and what a person had edited was lost."""
    edited = replace(DRAFT, entry="emoji_train,birds_train").to_yaml() + "weight_decay: 0.1  # mine\n"
    text = renamed(edited, "Their try")
    assert text == edited.replace("outputs/my_try", "outputs/their_try")
    recipe = read_draft("Their try", text)
    assert recipe.spec.train_entries == ("emoji_train", "birds_train") and recipe.spec.weight_decay == 0.1


@pytest.mark.attack("names")
@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a/b"])
def test_a_name_stays_in_configs(tmp_path: Path, name: str) -> None:
    assert write_draft(tmp_path, name, replace(DRAFT, name=name).to_yaml()).parent == tmp_path / "configs"


@pytest.mark.attack("YAML")
@pytest.mark.parametrize("text", ["", "- a", "stage: [", "model_name_or_path: x\nstage: dpo", "a: &a [*a]"])
def test_what_is_no_recipe_is_not_written(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError):
        write_draft(tmp_path, "mine", text)
    assert not (tmp_path / "configs").exists()


@pytest.mark.parametrize("text", [None, "", "max_steps: 3"])
def test_what_is_wrong_with_a_draft_is_said_without_a_path_of_this_machine(text: str | None) -> None:
    """A page's empty field gives None, which was a TypeError."""
    with pytest.raises(RecipeError, match=r"^the recipe[ :]"):
        read_draft("mine", text)
