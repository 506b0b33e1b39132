"""A line of recipes, the second starting from the first one's output, up to a release."""

import json

import pytest
from huggingface_hub import ModelCard

from tests.integration.conftest import EVERYTHING_PASSES, Project, line_of

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]
SHORT = {"max_steps": 1, "max_samples": 16}


@pytest.fixture
def staged(project: Project) -> Project:
    """A pretrained model of the Hub with a licence, a projector stage on it, and LoRA on that."""
    declared = project.root / project.package / "defs" / "pretrained" / "defs.yaml"
    text = declared.read_text().replace("kind: tiny_gemma3", "kind: local, repo: google/tiny, license: gemma")
    declared.write_text(text)
    project.write_recipe("first", **SHORT, freeze_language_model=True)
    project.write_recipe(
        "second", **SHORT, finetuning_type="lora", freeze_vision_tower=None, freeze_multi_modal_projector=None,
        model_name_or_path="outputs/first/latest/model",
    )  # fmt: skip
    project.set_defaults(gates=EVERYTHING_PASSES)
    return project


def test_a_staged_release_names_licence_and_hub_id_of_the_pretrained_model(staged: Project) -> None:
    output = staged.made(
        f'key:"pretrained/gemma3_tiny" or key:"first/checkpoint" or key:"second/vision_features" or {line_of("second")}'
    )
    release = staged.layout.releases("second") / "v1"
    front = ModelCard.load(release / "README.md").data.to_dict()
    assert (front["license"], front["base_model"]) == ("gemma", "google/tiny"), output
    config = json.loads((release / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "outputs/first/latest/model", "the Hub's model is not its base"
    recorded = staged.metadata("second", "checkpoint")
    assert recorded["base_model"]["hub_id"] is None and recorded["pretrained_model"]["hub_id"] == "google/tiny"
    show = staged.start("mllm_assets.cli", "releases", "show", "second")
    shown, _ = show.communicate(timeout=500)
    assert "  base model  outputs/first/latest/model, " in shown and "  pretrained  google/tiny, " in shown
    assert shown.count("licence gemma") == 2
