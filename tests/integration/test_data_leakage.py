"""A recipe that mixes datasets: what one trains on must not be what another evaluates on."""

import shutil

import pytest
import yaml

from tests.integration.conftest import Project

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_recipe_that_would_evaluate_on_pictures_it_trains_on_does_not_train(project: Project) -> None:
    defs = project.root / project.package / "defs"
    shutil.copytree(defs / "datasets" / "emoji", defs / "datasets" / "again")
    component = yaml.safe_load((defs / "datasets" / "again" / "defs.yaml").read_text())
    component["attributes"] |= {"name": "again", "split": {"num_train": 400, "num_val": 40, "seed": 7}}
    (defs / "datasets" / "again" / "defs.yaml").write_text(yaml.safe_dump(component))
    project.write_recipe("mixed", dataset="emoji_train", eval_dataset="again_val", max_steps=1, max_samples=8)

    run = project.materialize('+key:"again/dataset_info" or key:"mixed/checkpoint"')
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 1, output
    assert "pictures are trained on in one dataset and evaluated on in another" in output
    assert "of emoji_train ~ images/" in output and "Take one of the two entries out of the recipe" in output
    assert not (project.layout.outputs / "mixed").exists(), "nothing was trained"

    path = defs / "recipes" / "defs.yaml"
    recipes = yaml.safe_load(path.read_text())
    recipes["attributes"]["settings"] = [{"recipe": "mixed", "allow_leakage": True}]
    path.write_text(yaml.safe_dump(recipes))
    project.made('key:"mixed/checkpoint"')
    assert project.run_manifest("mixed")["num_steps"] == 1
