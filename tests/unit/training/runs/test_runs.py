"""A run is found again by its name: new, unfinished or finished; forced ones lie beside it."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.artifacts import write_manifest
from mllm_assets.errors import IntegrityError, MllmAssetsError, RecipeError
from mllm_assets.evaluation.run_lookup import find_run
from mllm_assets.layout import Layout
from mllm_assets.recipe.load import Recipe, load_recipe
from mllm_assets.training.runs.plan import RunPlan, describe_resume, plan_run, point_latest
from mllm_assets.training.runs.run_file import DATA_DIGESTS, StartingModel, pin_setting, record_starting_model
from mllm_assets.worker.run_settings import AnswerSample, RunSettings
from mllm_assets.worker.tasks import from_json, to_json


def finish(plan: RunPlan) -> None:
    plan.directory.mkdir(parents=True, exist_ok=True)
    write_manifest(plan.directory, {})


def begin(recipe: Recipe, project: Path, run_dir: Path) -> None:
    """What a run writes down when it begins."""
    plan = plan_run(load_recipe(recipe.path), root=project)
    start = StartingModel(plan.task.model_dir, plan.task.pretrained_fingerprint, plan.task.recipe)
    record_starting_model(run_dir, start)
    pin_setting(run_dir, DATA_DIGESTS, plan.task.data_digests)


def elsewhere(project: Path, output_dir: str) -> Recipe:
    return load_recipe(project / "configs" / "r.yaml", [f"output_dir={output_dir}"])


def test_a_run_is_new_then_unfinished_then_finished(recipe: Recipe, project: Path) -> None:
    plan = plan_run(recipe, root=project)
    assert plan.state == "new"
    assert plan.directory == project / "outputs" / "r" / plan.fingerprint
    assert set(plan.task.data_digests) == {"gemma3_vlm_train", "gemma3_vlm_val"}
    plan.directory.mkdir(parents=True)
    assert plan_run(recipe, root=project).state == "unfinished"
    finish(plan)
    assert plan_run(recipe, root=project).state == "finished"


def test_a_run_records_the_stages_before_it_and_itself(recipe: Recipe, project: Path) -> None:
    """What a later recipe starts from must say what all of its line was trained on."""
    first = plan_run(recipe, root=project)
    assert [stage["recipe"] for stage in first.task.stages] == [recipe.name]
    assert first.task.stages[0]["entries"] == {"gemma3_vlm_train": first.task.data_digests["gemma3_vlm_train"]}
    model = first.directory / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    write_manifest(first.directory, {"stages": list(first.task.stages)})
    later = load_recipe(project / "configs" / "r.yaml", ["output_dir=outputs/s", f"model_name_or_path={model}"])
    second = plan_run(later, root=project)
    assert [stage["fingerprint"] for stage in second.task.stages] == [first.fingerprint, second.fingerprint]
    assert second.task.stages[0]["dataset_dir"] == "data"
    (project / "photos").mkdir()
    third = plan_run(load_recipe(later.path, ["media_dir=photos"]), root=project)
    assert third.task.media_dir == project / "photos"
    assert third.task.stages[-1]["media_dir"] == "photos"


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


def test_how_much_is_asked_names_a_run_that_answers_choose_and_no_other(recipe: Recipe, project: Path) -> None:
    more = RunSettings(answers=AnswerSample(max_samples=8))

    def names(**values: Any) -> set[str]:
        chosen = load_recipe(recipe.path, {"eval_strategy": "steps", "save_strategy": "steps", **values})
        return {plan_run(chosen, root=project, settings=settings).fingerprint for settings in (RunSettings(), more)}

    by_answers = {"metric_for_best_model": "rouge_l", "load_best_model_at_end": True}
    assert len(names(**by_answers)) == 2
    assert len(names(**{**by_answers, "load_best_model_at_end": False})) == 1
    assert len(names(load_best_model_at_end=True)) == 1


def test_latest_points_to_the_finished_run_only(recipe: Recipe, project: Path) -> None:
    plan = plan_run(recipe, root=project)
    plan.directory.mkdir(parents=True)
    latest = plan.directory.parent / "latest"
    point_latest(plan)
    assert not latest.is_symlink()
    finish(plan)
    point_latest(plan)
    assert os.readlink(latest) == plan.fingerprint


def test_the_task_carries_the_plan_through_json(project: Path) -> None:
    recipe = elsewhere(project, "outputs/s")
    plan = plan_run(recipe, root=project)
    task = plan.task
    assert (task.run_dir, task.recipe) == (project / "outputs" / "s" / plan.fingerprint, recipe.spec)
    assert from_json(json.loads(json.dumps(to_json(task)))) == task


def test_an_unknown_entry_is_refused_before_anything_starts(project: Path) -> None:
    recipe = load_recipe(project / "configs" / "r.yaml", ["dataset=gemma3_vlm_trian"])
    with pytest.raises(RecipeError, match="gemma3_vlm_trian.*gemma3_vlm_train"):
        plan_run(recipe, root=project)


def test_resume_from_checkpoint_names_a_checkpoint_of_a_run_and_makes_another_run(project: Path) -> None:
    recipe = load_recipe(project / "configs" / "r.yaml", ["resume_from_checkpoint=outputs/r/0123/checkpoint-3"])
    named = project / "outputs" / "r" / "0123" / "checkpoint-3"
    with pytest.raises(
        RecipeError, match=r"checkpoint-3, which is not a complete checkpoint of a run here\. Name a check"
    ):
        plan_run(recipe, root=project)
    named.mkdir(parents=True)
    begin(recipe, project, named.parent)
    (named / "optimizer.pt").write_bytes(b"one")
    write_manifest(named, {"conditions": {}})
    plan = plan_run(recipe, root=project)
    assert plan.task.resume_from == named
    assert plan.fingerprint != plan_run(load_recipe(project / "configs" / "r.yaml"), root=project).fingerprint
    (named / "optimizer.pt").write_bytes(b"two")
    write_manifest(named, {"conditions": {}})
    assert plan_run(recipe, root=project).fingerprint != plan.fingerprint, "another optimizer state, another run"


def test_a_checkpoint_is_not_resumed_with_other_values_than_it_was_trained_with(project: Path) -> None:
    """The old learning rate, schedule, betas and data ran on, and the manifest recorded the new ones."""
    path = project / "configs" / "r.yaml"
    named = project / "outputs" / "r" / "0123" / "checkpoint-3"
    named.mkdir(parents=True)
    (named / "optimizer.pt").write_bytes(b"one")
    write_manifest(named, {"conditions": {}})
    resume = "resume_from_checkpoint=outputs/r/0123/checkpoint-3"
    with pytest.raises(RecipeError, match=r"0123/run\.json does not say what checkpoint-3 was trained with"):
        plan_run(load_recipe(path, [resume]), root=project)
    begin(load_recipe(path), project, named.parent)
    changes = {
        "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "adam_beta2": 0.99,
        "per_device_train_batch_size": 4, "seed": 7, "dataset": "gemma3_vlm_val", "num_train_epochs": 5.0,
    }  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        plan_run(load_recipe(path, {"resume_from_checkpoint": resume.partition("=")[2], **changes}), root=project)
    text = str(caught.value)
    written = load_recipe(path).spec
    for key, value in changes.items():
        if key != "dataset":
            assert f"  {key} was {getattr(written, key)!r}, and is {value!r} here\n" in text
    assert re.search(
        r"  dataset was \['gemma3_vlm_train \(\w{12}\)'\], and is \['gemma3_vlm_val \(\w{12}\)'\] here\n", text
    )
    assert len(re.findall("^  ", text, re.MULTILINE)) == len(changes)
    model = project / "outputs" / "r" / "0123" / "model"
    assert text.endswith(
        "Set them back; max_steps may be another number. To train on with other values, let that run finish first, "
        f"then set model_name_or_path: {model} and delete resume_from_checkpoint."
    )
    rows = json.loads((project / "data" / "train.json").read_text())
    assert plan_run(load_recipe(path, [resume, "max_steps=9", "save_steps=3"]), root=project).task.resume_from == named
    (project / "data" / "train.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(RecipeError, match=r"  dataset was \['gemma3_vlm_train \(\w+\)'\], and is"):
        plan_run(load_recipe(path, [resume]), root=project)


def test_a_trial_with_other_values_does_not_take_latest_and_is_found_by_them(
    recipe: Recipe, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`summary`, `Try it` and recipes that start from `latest` spoke of the trial."""
    layout = Layout(project)
    trial = plan_run(load_recipe(recipe.path, ["max_steps=60", "logging_steps=1"]), root=project)
    assert trial.task.overrides == {"max_steps": 60}
    trial.directory.mkdir(parents=True)
    write_manifest(trial.directory, {"overrides": trial.task.overrides})
    point_latest(trial)
    assert not (project / "outputs" / "r" / "latest").exists()
    monkeypatch.chdir(project)
    with pytest.raises(IntegrityError, match=rf"not trained as its file says; .* {trial.fingerprint} \(max_steps=60\)"):
        find_run(layout, "r")
    plan = plan_run(load_recipe(recipe.path, ["logging_steps=1"]), root=project)
    assert plan.task.overrides == {}
    finish(plan)
    point_latest(plan)
    assert find_run(layout, "r") == plan.directory.resolve()
    assert find_run(layout, "r", ["max_steps=60"]) == trial.directory.resolve()
    for same in (f"r/{trial.fingerprint}", f"outputs/r/{trial.fingerprint}/", str(trial.directory)):
        assert find_run(layout, same) == trial.directory.resolve()
    for same in ("outputs/r", "outputs/r/latest", "configs/r.yaml"):
        assert find_run(layout, same) == plan.directory.resolve(), "RECIPE and RUN are the same in every command"
    with pytest.raises(
        IntegrityError, match=r"r was not trained with max_steps=61\. There are runs with: max_steps=60"
    ):
        find_run(layout, "r", ["max_steps=61"])
    recipe.path.write_text(recipe.path.read_text() + "max_steps: 60\n")
    same = plan_run(load_recipe(recipe.path), root=project)
    point_latest(same)
    assert find_run(layout, "r") == trial.directory.resolve(), "the file says so now"


def test_what_a_stopped_run_goes_on_from_is_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    """A person who pressed Ctrl-C was not told whether anything was kept."""
    assert describe_resume(tmp_path) == "Started again, the run starts from step 0: no checkpoint was saved yet."
    for step in (4, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (4, 20):
        write_manifest(tmp_path / f"checkpoint-{step}", {})
    assert describe_resume(tmp_path) == "Started again, the run resumes from checkpoint-20."


HOSTILE_PATHS = ["a\0b", "a\nb", "x" * 300, "a/" * 2500, "loop", "loop/x"]


@pytest.mark.attack("names")
@pytest.mark.parametrize("path", HOSTILE_PATHS, ids=lambda path: ascii(path)[:16])
def test_a_path_of_a_recipe_that_is_none_is_a_sentence(project: Path, path: str) -> None:
    """All but those of `output_dir` ended in a traceback."""
    (project / "loop").symlink_to("loop")
    written = (project / "configs" / "r.yaml").read_text()
    for key in ("model_name_or_path", "dataset_dir", "resume_from_checkpoint", "adapter_name_or_path", "output_dir"):
        more = ["finetuning_type: lora"] if key.startswith("adapter") else []
        kept = [line for line in written.splitlines() if line.partition(":")[0] not in (key, "finetuning_type")]
        lines = [*kept, *(more or ["finetuning_type: full"]), f"{key}: {json.dumps(path)}"]
        (project / "configs" / "r.yaml").write_text("\n".join(lines) + "\n")
        with pytest.raises(MllmAssetsError, match=rf"{key}[^\n]*(cannot be a path|not printable|more than 200 bytes)"):
            plan_run(load_recipe(project / "configs" / "r.yaml"), root=project)


@pytest.mark.attack("names")
@pytest.mark.parametrize("output_dir", ["afile", "afile/x", "/dev/null"])
def test_runs_are_not_written_below_a_file(project: Path, output_dir: str) -> None:
    (project / "afile").write_text("mine")
    with pytest.raises(RecipeError, match=rf"output_dir is {output_dir}, and \S+ is no folder"):
        plan_run(elsewhere(project, output_dir), root=project)


@pytest.mark.attack("names")
def test_latest_is_of_the_recipe_as_written_whoever_ends_last(recipe: Recipe, project: Path) -> None:
    """Two trials and the recipe at once, a target that was deleted, and something else in the link's place."""
    plans = [plan_run(load_recipe(recipe.path, said), root=project) for said in ([], ["max_steps=2"], ["seed=7"])]
    latest = project / "outputs" / "r" / "latest"
    for plan in plans:
        finish(plan)
    for order in (plans, plans[::-1]):
        for plan in order:
            point_latest(plan)
        assert os.readlink(latest) == plans[0].fingerprint
    shutil.rmtree(plans[0].directory)
    for plan in plans:
        point_latest(plan)
    assert not latest.exists() and os.readlink(latest) == plans[0].fingerprint  # no trial takes its place
    with pytest.raises(IntegrityError, match=r"finished runs: .*To have it again .*r/checkpoint"):
        find_run(Layout(project), "r")
    finish(plans[0])
    latest.unlink()
    latest.mkdir()
    (latest / "mine.txt").write_text("kept")
    with pytest.raises(MllmAssetsError, match=r"latest is a folder, where a link belongs"):
        point_latest(plans[0])
    assert (latest / "mine.txt").read_text() == "kept"
