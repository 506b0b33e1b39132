"""A recipe means here what it means in LLaMA-Factory: the same losses, step by step, and the same finished run."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm_assets.artifacts import find_damage
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import TrainTask
from tests.worker_tasks import training

pytestmark = pytest.mark.integration

# One thread and float32 as recorded; LoRA's start is random and its reference was drawn by another PEFT
TOLERANCE = {"projector": 5e-6, "freeze": 5e-6, "full": 5e-6, "lora": 1e-3}
TOLERANCE |= dict.fromkeys(("lora_additional", "lora_pissa", "freeze_smooth"), 2e-5)


def reference_task(
    parity_dir: Path, run_dir: Path, name: str, *, data_dir: Path | None = None, **overrides: Any
) -> tuple[TrainTask, Any]:
    reference = json.loads((parity_dir / "reference" / f"{name}.json").read_text())
    known = {field.name for field in fields(TrainSpec)}
    values = {key: value for key, value in reference["config"].items() if key in known}
    task = training(
        TrainSpec(**{**values, **overrides}), model_dir=parity_dir / "model", data_dir=data_dir or parity_dir / "data",
        run_dir=run_dir,
    )  # fmt: skip
    return task, reference


@pytest.mark.parametrize("name", TOLERANCE)
def test_losses_equal_llamafactorys(parity_dir: Path, tmp_path: Path, name: str) -> None:
    task, reference = reference_task(parity_dir, tmp_path / "run", name)
    result = train_task(task, Reporter())
    lines = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses == pytest.approx(reference["losses"], abs=TOLERANCE[name])
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([log["learning_rate"] for log in reference["logs"] if "learning_rate" in log])
    eval_losses = [log["eval_loss"] for log in reference["logs"] if "eval_loss" in log]
    if eval_losses:
        assert result["eval_loss"] == pytest.approx(eval_losses[-1], abs=TOLERANCE[name])
    assert result["num_trainable_params"] == reference["trainable_params"]
    assert 0 < result["padding_share"] < 0.5


def test_a_finished_run_is_a_plain_model_directory_with_its_papers(parity_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    task, _ = reference_task(parity_dir, run_dir, "projector", save_strategy="steps", save_steps=8)
    result = train_task(task, Reporter())
    model, info = AutoModelForImageTextToText.from_pretrained(run_dir / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoProcessor.from_pretrained(run_dir / "model").tokenizer.chat_template
    assert model.config.text_config.use_cache is True
    assert result["reload"]["loss_saved"] == result["reload"]["loss_reloaded"]
    assert result["reload"]["num_missing"] == result["reload"]["num_unexpected"] == 0
    assert find_damage(run_dir) is None
    assert {"trainer_log.jsonl", "training_loss.png", "run.json"} <= result["files"].keys()
    assert any(name.startswith("logs/events.out.tfevents") for name in result["files"])
    assert not any(name.startswith("checkpoint-") for name in result["files"]), (
        "checkpoints may go, the run stays whole"
    )
    assert {path.name for path in run_dir.iterdir()} >= {"checkpoint-8", "checkpoint-16", "checkpoint-24"}
    assert not list(run_dir.glob(".*.tmp"))


def test_only_what_trains_has_changed(parity_dir: Path, tmp_path: Path) -> None:
    task, _ = reference_task(parity_dir, tmp_path / "run", "projector", max_steps=2)
    train_task(task, Reporter())
    before = load_file(parity_dir / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {name for name, tensor in before.items() if not tensor.equal(after[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)


def test_a_checkpoint_holds_what_trains_and_no_more(parity_dir: Path, tmp_path: Path) -> None:
    """8.6 GB for gemma-3-4b otherwise, instead of 36 MB."""
    task, _ = reference_task(
        parity_dir, tmp_path / "run", "projector", save_strategy="steps", save_steps=2, max_steps=4, save_total_limit=1
    )
    train_task(task, Reporter())
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-4"
    saved = load_file(checkpoint / "trainable.safetensors")
    assert sorted(name.split(".")[-2] for name in saved) == ["mm_soft_emb_norm", "multi_modal_projector"]


def test_a_finished_run_is_returned_and_not_trained_again(parity_dir: Path, tmp_path: Path) -> None:
    task, _ = reference_task(parity_dir, tmp_path / "run", "projector", max_steps=2)
    first = train_task(task, Reporter())
    changed = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    assert train_task(task, Reporter()) == first
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == changed


def test_accumulation_gives_the_trajectory_of_the_large_batch(parity_dir: Path, tmp_path: Path) -> None:
    """Equal rows: a mean of micro-batch means is the mean of the batch only if each holds as many tokens."""
    data = tmp_path / "data"
    shutil.copytree(parity_dir / "data" / "images", data / "images")
    rows = json.loads((parity_dir / "data" / "train.json").read_text())
    (data / "train.json").write_text(json.dumps([rows[0], rows[0], rows[0], rows[0]]))
    info = json.loads((parity_dir / "data" / "dataset_info.json").read_text())
    (data / "dataset_info.json").write_text(json.dumps({"gemma3_vlm_train": info["gemma3_vlm_train"]}))
    losses = {}
    for size, steps in ((4, 1), (1, 4)):
        task, _ = reference_task(
            parity_dir, tmp_path / f"run{size}", "full", eval_strategy="no", eval_dataset=None, num_train_epochs=4,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, data_dir=data,
        )  # fmt: skip
        train_task(task, Reporter())
        lines = (tmp_path / f"run{size}" / "trainer_log.jsonl").read_text().splitlines()
        losses[size] = [json.loads(line)["loss"] for line in lines]
    assert losses[4] == pytest.approx(losses[1], abs=5e-6)
