"""`mllm-assets enable` switches on what the shipped declarations leave off, and changes nothing else in a file."""

from pathlib import Path

import pytest

from mllm_assets.errors import RecipeError
from mllm_assets.project.create import create_project
from mllm_assets.project.enable import enable
from mllm_assets.safe_yaml import load_all


@pytest.fixture
def project(tmp_path: Path) -> Path:
    create_project(tmp_path / "birds")
    return tmp_path / "birds"


def declared(project: Path, *folders: str) -> dict:
    [document] = load_all(project.joinpath("birds", "defs", *folders, "defs.yaml"))
    return document["attributes"]


def test_a_recipe_is_added_to_those_that_are_on(project: Path) -> None:
    assert "is on" in enable(project, "gemma3_lora_sft")
    enable(project, "gemma3-projector-sft")
    assert declared(project, "recipes")["enabled"] == ["gemma3_lora_sft", "gemma3_projector_sft"]
    assert declared(project, "recipes")["weekly_retraining"]["enabled"] is False
    assert enable(project, "gemma3_lora_sft") == "gemma3_lora_sft is on already."
    text = (project / "birds" / "defs" / "recipes" / "defs.yaml").read_text()
    assert "# those whose model or data are off" in text and "# true: retrain on schedule" in text


def test_a_dataset_and_a_model_are_switched_on_where_they_are_declared(project: Path) -> None:
    enable(project, "naruto")
    enable(project, "gemma3-4b-it")
    assert declared(project, "datasets", "naruto")["enabled"] is True
    assert declared(project, "datasets", "pokemon")["enabled"] is False
    tiny, large = declared(project, "pretrained")["models"]
    assert large["enabled"] is True and "enabled" not in tiny


def test_an_unknown_name_is_refused_with_the_nearest(project: Path) -> None:
    with pytest.raises(RecipeError, match="called 'narto'. Did you mean 'naruto'?"):
        enable(project, "narto")


@pytest.mark.parametrize(
    "text",
    [
        "{type: mllm_assets.components.ImageTextDataset, attributes: {name: naruto, enabled: false}}\n",
        'type: x.ImageTextDataset\nattributes:\n  name: naruto\n  watch:\n    enabled: false\n  "enabled": false\n',
    ],
)
def test_a_file_in_another_form_stays_as_it_is_and_the_message_says_what_to_write(project: Path, text: str) -> None:
    path = project / "birds" / "defs" / "datasets" / "naruto" / "defs.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="`enabled: true` for a dataset"):
        enable(project, "naruto")
    assert path.read_text() == text


def test_a_list_of_lines_or_no_key_at_all_is_not_lost(project: Path) -> None:
    path = project / "birds" / "defs" / "recipes" / "defs.yaml"
    path.write_text("type: x.FineTuning\nattributes:\n  recipes: configs/*.yaml\n")
    enable(project, "emoji_sft")
    assert declared(project, "recipes") == {"recipes": "configs/*.yaml", "enabled": ["emoji_sft"]}
