"""`<recipe>/what_it_gained`: a recipe is trained once more without people's corrections, and both answer the same."""

import json

import pytest

from mllm_assets.data.curate.corrections import Correction, add_corrections
from mllm_assets.data.sharegpt.dataset import Dataset
from tests.integration.conftest import EVERYTHING_PASSES, Project

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_recipe_is_compared_with_itself_without_corrections(project: Project) -> None:
    project.write_recipe("mine", freeze_vision_tower=True, max_steps=2, save_steps=2)
    project.set_defaults(gates=EVERYTHING_PASSES, what_it_gained=True)
    train = Dataset(project.layout.data, read_part=None).entry("emoji_train").rows
    first, second = train[0], train[1]
    labels = sorted({str(row.label) for row in train} - {str(first.label)})
    relabel = Correction(
        sample_id=first.id, action="relabel", old=str(first.label), new=labels[0], who="Ada", why="as an example"
    )
    add_corrections(project.layout, "emoji", [relabel, Correction(sample_id=second.id, action="drop", who="Ada")])
    of_data = " or ".join(f'key:"emoji/{name}"' for name in "corrections train val test dataset_info".split())
    assets = ("vision_features", "checkpoint", "predictions", "what_it_gained")
    project.made(f"{of_data} or " + " or ".join(f'key:"mine/{name}"' for name in assets))
    metadata = project.metadata("mine", "what_it_gained")
    assert (metadata["num_changed"], metadata["num_dropped"]) == (1, 1)
    [found] = project.layout.outputs.glob("mine/what_it_gained/*/what_it_gained.json")
    [(entry, scored)] = json.loads(found.read_text()).items()
    assert entry == "emoji_test" and scored["metrics"]["label_accuracy"]["gain"]["num_pairs"] == scored["num_samples"]
    without = json.loads((project.root / metadata["run_without"] / "manifest.json").read_text())
    assert without["overrides"] == {"dataset": "emoji_train_uncorrected"}
    assert without["num_train_samples"] == project.run_manifest("mine")["num_train_samples"] + 1
    assert (project.layout.outputs / "mine" / "latest").resolve().name == project.run_manifest("mine")["fingerprint"]
