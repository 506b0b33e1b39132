"""A recipe that mixes datasets: what one trains on, or an earlier stage did, must not be what another evaluates on."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mllm_assets.artifacts import read_manifest
from tests.integration.conftest import Project, copied_project, line_of

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]


def add_emoji_again(project: Project) -> None:
    """The same pictures, split otherwise."""
    defs = project.root / project.package / "defs"
    shutil.copytree(defs / "datasets" / "emoji", defs / "datasets" / "again")
    component = yaml.safe_load((defs / "datasets" / "again" / "defs.yaml").read_text())
    component["attributes"] |= {"name": "again", "split": {"num_train": 400, "num_val": 40, "seed": 7}}
    (defs / "datasets" / "again" / "defs.yaml").write_text(yaml.safe_dump(component))


SHORT = {"max_steps": 1, "max_samples": 8}
GATES = {"min_loss_gain_nats": -99, "min_answer_gain": -1, "min_image_gain_nats": -99}


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A project in which a recipe, and a second stage, were run that would be evaluated on what was trained on."""

    project: Project
    output: str
    is_trained: dict[str, bool]  # by recipe, before leakage was allowed


@pytest.fixture(scope="module")
def tried(emoji_ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tried]:
    """All of it in one run, and once more with the leakage allowed."""
    with copied_project(emoji_ready, tmp_path_factory.mktemp("leakage") / "project") as project:
        add_emoji_again(project)
        project.write_recipe("mixed", dataset="emoji_train", eval_dataset="again_val", **SHORT)
        project.write_recipe("first", dataset="again_train", eval_dataset="again_val", **SHORT)
        project.write_recipe("second", model_name_or_path="outputs/first/latest/model", **SHORT)
        checkpoints = [f'key:"{recipe}/checkpoint"' for recipe in ("mixed", "first", "second")]
        run = project.materialize(" or ".join(['+key:"again/dataset_info"', *checkpoints]))
        output, _ = run.communicate(timeout=500)
        assert run.returncode == 1, output
        trained = {name: (project.layout.outputs / name).exists() for name in ("mixed", "first", "second")}

        path = project.root / project.package / "defs" / "recipes" / "defs.yaml"
        recipes = yaml.safe_load(path.read_text())
        allowed = [{"recipe": "mixed", "allow_leakage": True}]
        recipes["attributes"]["settings"] = [*allowed, {"recipe": "second", "allow_leakage": True, "gates": GATES}]
        path.write_text(yaml.safe_dump(recipes))
        project.made(f'key:"mixed/checkpoint" or key:"second/vision_features" or {line_of("second")}')
        yield Tried(project=project, output=output, is_trained=trained)


def test_a_recipe_that_would_evaluate_on_pictures_it_trains_on_does_not_train(tried: Tried) -> None:
    assert "pictures are trained on in one dataset and evaluated on in another" in tried.output
    assert "of emoji_train ~ images/" in tried.output
    assert "Take one of the two entries out of the recipe" in tried.output
    assert not tried.is_trained["mixed"], "nothing was trained"
    assert tried.project.run_manifest("mixed")["num_steps"] == 1, "it trains where that is allowed"


def test_a_stage_that_is_evaluated_on_pictures_of_an_earlier_one_does_not_train(tried: Tried) -> None:
    """Its own entries are of one dataset: only its base model has seen what it is evaluated on."""
    fingerprint = tried.project.run_manifest("first")["fingerprint"]
    assert "were trained on in an earlier stage, the first: images/" in tried.output
    leak = f"again_train, which the earlier stage first (run {fingerprint}) trained on, ~ images/"
    assert leak in tried.output
    assert tried.is_trained["first"] and not tried.is_trained["second"], "nothing was trained"

    assert [stage["recipe"] for stage in tried.project.run_manifest("second")["stages"]] == ["first", "second"]
    [recorded] = read_manifest(tried.project.layout.releases("second") / "v1")["lineage"]["leaks"]
    assert leak in recorded
