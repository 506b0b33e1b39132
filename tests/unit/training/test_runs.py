"""A run is found again by its name: new, unfinished or finished; forced ones lie beside it."""

import json
import os
from pathlib import Path

import pytest

from mllm_assets.artifacts import write_manifest
from mllm_assets.errors import RecipeError
from mllm_assets.training.recipe import Recipe, load_recipe
from mllm_assets.training.runs import (
    RunPlan,
    describe_resume,
    plan_run,
    point_latest,
    train_request,
)
from mllm_assets.training.spec import TrainSpec


def finish(plan: RunPlan) -> None:
    plan.directory.mkdir(parents=True, exist_ok=True)
    write_manifest(plan.directory, {})


def test_a_run_is_new_then_unfinished_then_finished(recipe: Recipe, project: Path) -> None:
    plan = plan_run(recipe, root=project)
    assert plan.state == "new"
    assert plan.directory == project / "outputs" / "r" / plan.fingerprint
    assert set(plan.data_digests) == {"gemma3_vlm_train", "gemma3_vlm_val"}
    plan.directory.mkdir(parents=True)
    assert plan_run(recipe, root=project).state == "unfinished"
    finish(plan)
    assert plan_run(recipe, root=project).state == "finished"


def test_a_run_records_the_stages_before_it_and_itself(recipe: Recipe, project: Path) -> None:
    """What a later recipe starts from must say what all of its line was trained on."""
    first = plan_run(recipe, root=project)
    assert [stage.recipe for stage in first.stages] == [recipe.name]
    assert first.stages[0].entries == {"gemma3_vlm_train": first.data_digests["gemma3_vlm_train"]}
    model = first.directory / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    write_manifest(first.directory, {"stages": train_request(first)["stages"]})
    second = plan_run(recipe, root=project, model_dir=model, output_dir=project / "outputs" / "s")
    assert [stage.fingerprint for stage in second.stages] == [first.fingerprint, second.fingerprint]
    assert second.stages[0].data_dir == project / "data"


def test_force_trains_again_beside_the_finished_run(recipe: Recipe, project: Path) -> None:
    first = plan_run(recipe, root=project)
    finish(first)
    second = plan_run(recipe, root=project, force=True)
    assert (second.fingerprint, second.state) == (f"{first.fingerprint}-2", "new")
    finish(second)
    assert plan_run(recipe, root=project, force=True).fingerprint == f"{first.fingerprint}-3"
    assert plan_run(recipe, root=project).fingerprint == second.fingerprint


def test_a_forced_run_that_was_killed_is_resumed_by_the_next_attempt(recipe: Recipe, project: Path) -> None:
    """Dagster's retry asks with the same config: it must go on with -2, not begin -3."""
    finish(plan_run(recipe, root=project))
    killed = plan_run(recipe, root=project, force=True)
    killed.directory.mkdir()
    again = plan_run(recipe, root=project, force=True)
    assert (again.fingerprint, again.state) == (killed.fingerprint, "unfinished")


def test_without_force_an_unfinished_forced_run_does_not_hide_the_finished_one(recipe: Recipe, project: Path) -> None:
    first = plan_run(recipe, root=project)
    finish(first)
    plan_run(recipe, root=project, force=True).directory.mkdir()
    assert plan_run(recipe, root=project) == plan_run(recipe, root=project, force=False)
    assert plan_run(recipe, root=project).fingerprint == first.fingerprint


def test_changed_data_is_another_run(recipe: Recipe, project: Path) -> None:
    before = plan_run(recipe, root=project)
    path = project / "data" / "train.json"
    rows = json.loads(path.read_text())
    rows[0]["messages"][-1]["content"] += "!"
    path.write_text(json.dumps(rows))
    assert plan_run(recipe, root=project).fingerprint != before.fingerprint


def test_latest_points_to_the_finished_run_only(recipe: Recipe, project: Path) -> None:
    plan = plan_run(recipe, root=project)
    plan.directory.mkdir(parents=True)
    latest = plan.directory.parent / "latest"
    point_latest(plan)
    assert not latest.is_symlink()
    finish(plan)
    point_latest(plan)
    assert os.readlink(latest) == plan.fingerprint


def test_the_request_is_json_and_carries_the_plan(recipe: Recipe, project: Path) -> None:
    plan = plan_run(recipe, root=project, output_dir=project / "elsewhere")
    request = json.loads(json.dumps(train_request(plan, accelerator={"device": "cpu"})))
    assert request["task"] == "train"
    assert request["run_dir"] == str(project / "elsewhere" / plan.fingerprint)
    assert TrainSpec.from_dict(request["recipe"]) == recipe.spec
    assert request["accelerator"] == {"device": "cpu"} and request["features_dir"] is None


def test_an_unknown_entry_is_refused_before_anything_starts(project: Path) -> None:
    recipe = load_recipe(project / "configs" / "r.yaml", ["dataset=gemma3_vlm_trian"])
    with pytest.raises(RecipeError, match="gemma3_vlm_trian.*gemma3_vlm_train"):
        plan_run(recipe, root=project)


def test_resume_from_checkpoint_names_a_checkpoint_of_a_run_and_makes_another_run(project: Path) -> None:
    recipe = load_recipe(project / "configs" / "r.yaml", ["resume_from_checkpoint=outputs/r/0123/checkpoint-3"])
    named = project / "outputs" / "r" / "0123" / "checkpoint-3"
    with pytest.raises(
        RecipeError, match=r"checkpoint-3, which is no complete checkpoint of a run here\. Name a check"
    ):
        plan_run(recipe, root=project)
    named.mkdir(parents=True)
    (named / "optimizer.pt").write_bytes(b"one")
    write_manifest(named, {"conditions": {}})
    plan = plan_run(recipe, root=project)
    assert train_request(plan)["resume_from"] == str(named)
    assert plan.fingerprint != plan_run(load_recipe(project / "configs" / "r.yaml"), root=project).fingerprint
    (named / "optimizer.pt").write_bytes(b"two")
    write_manifest(named, {"conditions": {}})
    assert plan_run(recipe, root=project).fingerprint != plan.fingerprint, "another optimizer state, another run"


def test_what_a_stopped_run_goes_on_from_is_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    """A person who pressed Ctrl-C was not told whether anything was kept."""
    assert describe_resume(tmp_path) == "Started again, the run begins anew: no checkpoint was saved yet."
    for step in (4, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (4, 20):
        write_manifest(tmp_path / f"checkpoint-{step}", {})
    assert describe_resume(tmp_path) == "Started again, the run goes on from checkpoint-20."
