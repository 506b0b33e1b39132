"""A run's name stands for what it computes, no more and no less."""

import json
import os
from pathlib import Path

import pytest

from mllm_assets.artifacts import write_manifest
from mllm_assets.errors import RecipeError
from mllm_assets.training.recipe import Recipe, TrainSpec, load_recipe
from mllm_assets.training.runs import (
    RunPlan,
    fingerprint,
    plan_run,
    point_latest,
    train_request,
)


def name_of(train: str = "t1", val: str = "v1", model: str = "m1", num_processes: int = 1, **values: object) -> str:
    spec = TrainSpec.from_dict(
        {
            "model_name_or_path": "m",
            "dataset": "a",
            "eval_dataset": "b",
            "template": "gemma3",
            "do_train": True,
            **values,
        }
    )
    digests = {spec.train_entries[0]: train, spec.train_entries[-1]: train, "b": val}
    return fingerprint(
        spec,
        data_digests=digests,
        eval_digests=digests,
        pretrained_fingerprint=model,
        num_processes=num_processes,
    )


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3},
        {"seed": 1},
        {"num_train_epochs": 1},
        {"warmup_ratio": 0.1},
        {"finetuning_type": "full"},
        {"bf16": True},
        {"cutoff_len": 64},
        {"max_samples": 9},
        {"train": "t2"},
        {"model": "m2"},
        {"num_processes": 2},
        {"disable_shuffling": True},
        {"lora_rank": 4},
        {"freeze_vision_tower": False},
        {"use_dora": True},
        {"use_rslora": True},
        {"train_on_prompt": True},
        {"mask_history": True},
        {"packing": True},
        {"neat_packing": True},
        {"eval_dataset": None, "val_size": 0.2},
    ],
    ids=str,
)
def test_what_changes_the_weights_changes_the_name(change: dict) -> None:
    assert name_of(**change) != name_of()


@pytest.mark.parametrize(
    "change",
    [
        {"logging_steps": 1},
        {"save_steps": 1},
        {"save_total_limit": 1},
        {"output_dir": "elsewhere"},
        {"dataloader_num_workers": 4},
        {"eval_strategy": "epoch"},
        {"per_device_eval_batch_size": 1},
        {"val": "v2"},
        {"dataset": "renamed"},
        {"model_name_or_path": "moved"},
        {"plot_loss": True},
        {"use_cpu": True},
        {"disable_gradient_checkpointing": True},
        {"lora_alpha": 16},  # the default, spelled out
        {"ddp_timeout": 180000000},
        {"preprocessing_batch_size": 10},  # nothing is packed
        {"mix_strategy": "interleave_under"},  # of one entry
        {"freeze_trainable_layers": 3},  # it is a LoRA recipe
    ],
    ids=str,
)
def test_what_does_not_change_the_weights_keeps_the_name(change: dict) -> None:
    """A new name would throw a finished run away because somebody wanted more log lines."""
    assert name_of(**change) == name_of()


@pytest.mark.parametrize(
    "change", [{"val": "v2"}, {"eval_steps": 250}, {"per_device_eval_batch_size": 1}, {"save_steps": 1500}], ids=str
)
def test_evaluation_counts_where_it_picks_the_weights(change: dict) -> None:
    chosen = {"eval_strategy": "steps", "load_best_model_at_end": True}
    assert name_of(**{**chosen, **change}) != name_of(**chosen)


@pytest.mark.parametrize(
    ("change", "given"),
    [
        ({"mix_strategy": "interleave_under"}, {"dataset": "a,c"}),
        ({"interleave_probs": "0.3,0.7"}, {"dataset": "a,c", "mix_strategy": "interleave_over", "eval_dataset": None}),
        ({"preprocessing_batch_size": 10}, {"packing": True}),
        ({"preprocessing_num_workers": 2}, {"packing": True}),
    ],
    ids=str,
)
def test_a_key_counts_where_it_is_read(change: dict, given: dict) -> None:
    assert name_of(**given, **change) != name_of(**given)


def test_the_order_of_entries_counts() -> None:
    """They are concatenated, so another order trains on other batches."""
    spec = {"model_name_or_path": "m", "template": "gemma3", "do_train": True}
    names = {
        fingerprint(
            TrainSpec.from_dict({**spec, "dataset": order}),
            data_digests={"a": "1", "b": "2"},
            eval_digests={},
            pretrained_fingerprint="m",
        )
        for order in ("a,b", "b,a")
    }
    assert len(names) == 2


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
