"""A recipe that mixes datasets: what one trains on, or an earlier stage did, must not be what another evaluates on."""

import shutil

import pytest
import yaml

from mllm_assets.artifacts import read_manifest
from tests.integration.conftest import Project, line_of

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]


def add_emoji_again(project: Project) -> None:
    """The same pictures, split otherwise."""
    defs = project.root / project.package / "defs"
    shutil.copytree(defs / "datasets" / "emoji", defs / "datasets" / "again")
    component = yaml.safe_load((defs / "datasets" / "again" / "defs.yaml").read_text())
    component["attributes"] |= {"name": "again", "split": {"num_train": 400, "num_val": 40, "seed": 7}}
    (defs / "datasets" / "again" / "defs.yaml").write_text(yaml.safe_dump(component))


def allow_leakage(project: Project, recipe: str, **settings: object) -> None:
    path = project.root / project.package / "defs" / "recipes" / "defs.yaml"
    recipes = yaml.safe_load(path.read_text())
    recipes["attributes"]["settings"] = [{"recipe": recipe, "allow_leakage": True, **settings}]
    path.write_text(yaml.safe_dump(recipes))


def test_a_recipe_that_would_evaluate_on_pictures_it_trains_on_does_not_train(project: Project) -> None:
    add_emoji_again(project)
    project.write_recipe("mixed", dataset="emoji_train", eval_dataset="again_val", max_steps=1, max_samples=8)

    run = project.materialize('+key:"again/dataset_info" or key:"mixed/checkpoint"')
    output, _ = run.communicate(timeout=500)
    assert run.returncode == 1, output
    assert "pictures are trained on in one dataset and evaluated on in another" in output
    assert "of emoji_train ~ images/" in output and "Take one of the two entries out of the recipe" in output
    assert not (project.layout.outputs / "mixed").exists(), "nothing was trained"

    allow_leakage(project, "mixed")
    project.made('key:"mixed/checkpoint"')
    assert project.run_manifest("mixed")["num_steps"] == 1


def test_a_stage_that_is_evaluated_on_pictures_of_an_earlier_one_does_not_train(project: Project) -> None:
    """Its own entries are of one dataset: only its base model has seen what it is evaluated on."""
    add_emoji_again(project)
    short = {"max_steps": 1, "max_samples": 8}
    project.write_recipe("first", dataset="again_train", eval_dataset="again_val", **short)
    project.write_recipe("second", model_name_or_path="outputs/first/latest/model", **short)
    project.made('+key:"first/checkpoint"')

    run = project.materialize('key:"second/checkpoint"')
    output, _ = run.communicate(timeout=500)
    assert run.returncode == 1, output
    fingerprint = project.run_manifest("first")["fingerprint"]
    assert "were trained on in an earlier stage, the first: images/" in output
    assert f"again_train, which the earlier stage first (run {fingerprint}) trained on, ~ images/" in output
    assert not (project.layout.outputs / "second").exists(), "nothing was trained"

    gates = {"min_loss_gain_nats": -99, "min_answer_gain": -1, "min_image_gain_nats": -99}
    allow_leakage(project, "second", gates=gates)
    project.made(f'key:"second/vision_features" or {line_of("second")}')
    assert [stage["recipe"] for stage in project.run_manifest("second")["stages"]] == ["first", "second"]
    [leak] = read_manifest(project.layout.releases("second") / "v1")["lineage"]["leaks"]
    assert f"again_train, which the earlier stage first (run {fingerprint}) trained on, ~ images/" in leak
