"""What stops a run, and what it says: numbers, images, memory, best model, precision."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mllm_assets.artifacts import is_complete
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import DataError, IntegrityError, MachineError, ModelError, RecipeError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.loop.checkpoints import load_checkpoint
from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.models.load import load_model
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import TrainTask
from tests.worker_tasks import training

pytestmark = pytest.mark.integration


def make_task(
    parity_dir: Path, run_dir: Path, *, model_dir: Path | None = None, data_dir: Path | None = None, **overrides: Any
) -> TrainTask:
    values = {
        "model_name_or_path": "model", "dataset": "gemma3_vlm_train", "template": "gemma3", "do_train": True,
        "finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False,
        "learning_rate": 1e-3, "per_device_train_batch_size": 4, "max_steps": 6, "logging_steps": 1, "save_steps": 2,
    }  # fmt: skip
    return training(
        TrainSpec(**{**values, **overrides}), model_dir=model_dir or parity_dir / "model",
        data_dir=data_dir or parity_dir / "data", run_dir=run_dir,
    )  # fmt: skip


def test_a_step_that_is_not_finite_stops_the_run_before_the_optimizer(parity_dir: Path, tmp_path: Path) -> None:
    """The library replaces the loss in its log and goes on with ruined weights."""
    for name in ("model", "data"):
        shutil.copytree(parity_dir / name, tmp_path / name)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    next(tensor for name, tensor in tensors.items() if name.endswith("model.norm.weight")).fill_(3e38)  # a number still
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    task = make_task(tmp_path, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"Step \d is not finite: loss .* Lower learning_rate") as caught:
        train_task(task, Reporter())
    named = str(caught.value).split("with the samples ")[1].split(". ")[0].split(", ")
    known = {row.id for row in Dataset(parity_dir / "data").entry("gemma3_vlm_train").rows}
    assert len(named) == task.recipe.per_device_train_batch_size and set(named) <= known
    assert not is_complete(tmp_path / "run")


def test_a_damaged_image_is_named_with_its_row(parity_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(parity_dir / "data", tmp_path / "data")
    image = tmp_path / "data" / "images" / "emoji_007.png"
    image.write_bytes(image.read_bytes()[:200])
    task = make_task(parity_dir, tmp_path / "run", data_dir=tmp_path / "data")
    with pytest.raises(DataError, match=r"emoji_007\.png of row .* cannot be used"):
        train_task(task, Reporter())


def test_data_that_changed_after_the_run_was_named_by_it_is_refused(parity_dir: Path, tmp_path: Path) -> None:
    """A dataset materialised between plan and training would give other weights under the old name."""
    shutil.copytree(parity_dir / "data", tmp_path / "data")
    task = make_task(parity_dir, tmp_path / "run", data_dir=tmp_path / "data")
    rows = json.loads((tmp_path / "data" / "train.json").read_text())
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(IntegrityError, match=r"The entry gemma3_vlm_train in .* changed after this run was named"):
        train_task(task, Reporter())


def test_rows_that_are_cut_are_counted(parity_dir: Path, tmp_path: Path) -> None:
    reporter = Reporter()
    result = train_task(make_task(parity_dir, tmp_path / "run", cutoff_len=90, max_steps=1), reporter)
    (warning,) = result["warnings"]
    assert warning.endswith("of 48 rows are longer than cutoff_len 90 and were cut.")


def test_a_run_that_cannot_fit_is_refused_before_the_weights_load(parity_dir: Path, tmp_path: Path) -> None:
    task = make_task(parity_dir, tmp_path / "run", per_device_train_batch_size=10**8)
    with pytest.raises(MachineError, match=r"The run needs about .* GiB .* With per_device_train_batch_size: "):
        train_task(task, Reporter())


def assert_published(run_dir: Path, step: int) -> None:
    """The published weights are those of the checkpoint, tensor by tensor."""
    kept = load_file(run_dir / f"checkpoint-{step}" / "trainable.safetensors")
    published = load_file(run_dir / "model" / "model.safetensors")
    for name, tensor in kept.items():
        found = published[next(key for key in published if key.endswith(name.split("model.", 1)[1]))]
        assert found.equal(tensor.to(found.dtype))


def eval_losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "trainer_log.jsonl").read_text().splitlines()]
    return {line["current_steps"]: line["eval_loss"] for line in lines if "eval_loss" in line}


BEST = {
    "eval_dataset": "gemma3_vlm_val", "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
}  # fmt: skip


def test_the_best_checkpoint_is_the_one_that_is_published(parity_dir: Path, tmp_path: Path) -> None:
    """`load_best_model_at_end` loads nothing for Gemma 3 in the library: no key matches, and it only warns."""
    rates = {"learning_rate": 3.0, "lr_scheduler_type": "constant", "warmup_steps": 2}
    result = train_task(make_task(parity_dir, tmp_path / "run", **BEST, **rates), Reporter())
    measured = eval_losses(tmp_path / "run")
    best = min(measured, key=lambda step: measured[step])
    assert best != 6, "the rate is too high for the last step to be the best"
    assert_published(tmp_path / "run", best)
    lines = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    [loss] = [line["loss"] for line in lines if line["current_steps"] == best and "loss" in line]
    found = (result["published_step"], result["eval_loss"], result["final_loss"], result["num_steps"])
    assert found == (best, measured[best], loss, 6), "the losses were those of the last evaluation"


def test_the_best_checkpoint_may_be_the_last(parity_dir: Path, tmp_path: Path) -> None:
    """The library remembers it under the name of the folder that it was built in, which is gone by then."""
    train_task(make_task(parity_dir, tmp_path / "run", **BEST), Reporter())
    measured = eval_losses(tmp_path / "run")
    assert min(measured, key=lambda step: measured[step]) == 6
    assert_published(tmp_path / "run", 6)


def test_early_stopping_ends_the_run_and_publishes_the_best_weights(parity_dir: Path, tmp_path: Path) -> None:
    task = make_task(
        parity_dir, tmp_path / "run", **BEST | {"eval_steps": 1}, save_steps=1, early_stopping_steps=1,
        learning_rate=3.0, lr_scheduler_type="constant",
    )  # fmt: skip
    num_steps = train_task(task, Reporter())["num_steps"]
    measured = eval_losses(tmp_path / "run")
    best = min(measured, key=lambda step: measured[step])
    assert best < num_steps < 6
    assert_published(tmp_path / "run", best)


def test_early_stopping_without_the_best_publishes_the_weights_it_stopped_at(parity_dir: Path, tmp_path: Path) -> None:
    task = make_task(
        parity_dir, tmp_path / "run", **BEST | {"eval_steps": 1, "load_best_model_at_end": False},
        save_steps=1, save_total_limit=3,
        metric_for_best_model="loss", early_stopping_steps=1, learning_rate=3.0, lr_scheduler_type="constant",
    )  # fmt: skip
    num_steps = train_task(task, Reporter())["num_steps"]
    assert num_steps < 6
    assert_published(tmp_path / "run", num_steps)


def test_fsdp_with_one_process_is_refused(parity_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"this run has one\. Set num_processes of the accelerator .* to 2 or more"):
        train_task(make_task(parity_dir, tmp_path / "run", fsdp=True), Reporter())


def test_deepspeed_that_is_not_installed_is_said(parity_dir: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("deepspeed is installed here")
    task = make_task(parity_dir, tmp_path / "run", deepspeed={"zero_optimization": {"stage": 2}})
    with pytest.raises(MachineError, match=r"asks for deepspeed, which is not installed\. Install it \(pip install"):
        train_task(task, Reporter())


def test_bf16_trains_float32_parameters_under_autocast(parity_dir: Path, tmp_path: Path) -> None:
    """As LLaMA-Factory: what trains is float32, what is frozen bfloat16. Published in the model's own dtype."""
    result = train_task(make_task(parity_dir, tmp_path / "run", bf16=True), Reporter())
    saved = load_file(tmp_path / "run" / "checkpoint-6" / "trainable.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    model = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in model.values()} == {torch.float32}
    assert result["final_loss"] == pytest.approx(7.1, abs=0.2)


@pytest.mark.parametrize(
    "values",
    [{"bf16": True}, {"pure_bf16": True}, {"bf16": True, "finetuning_type": "lora", "freeze_language_model": False}],
    ids=["bf16", "pure_bf16", "lora"],
)
def test_what_is_published_is_the_base_with_what_was_trained_under_one_dtype(
    parity_dir: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    """Frozen weights were rounded to bfloat16, stored as float32, and called three dtypes in config.json."""
    run_dir = tmp_path / "run"
    result = train_task(make_task(parity_dir, run_dir, max_steps=2, **values), Reporter())
    config = json.loads((run_dir / "model" / "config.json").read_text())
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    assert {part.get("dtype", "float32") for part in parts} == {"float32"} and config["dtype"] == "float32"
    base = load_file(parity_dir / "model" / "model.safetensors")
    published = load_file(run_dir / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in published.values()} == {torch.float32}
    changed = {name for name in base if not base[name].equal(published[name])}
    if "finetuning_type" in values:
        plain = AutoModelForImageTextToText.from_pretrained(parity_dir / "model")
        merged = PeftModel.from_pretrained(plain, run_dir / "adapter").merge_and_unload().state_dict()
        of_checkpoint = load_checkpoint(run_dir / "checkpoint-2").state_dict()
        whole = load_model(run_dir / "model").state_dict()
        assert all(merged[name].equal(tensor) and of_checkpoint[name].equal(tensor) for name, tensor in whole.items())
        assert changed and all("_proj.weight" in name for name in changed)
    else:
        assert changed and all("multi_modal_projector" in name for name in changed)
        assert_published(run_dir, 2)
    assert result["reload"]["loss_saved"] == result["reload"]["loss_reloaded"]


def test_lora_publishes_merged_weights_and_its_adapter_beside(parity_dir: Path, tmp_path: Path) -> None:
    train_task(make_task(parity_dir, tmp_path / "run", finetuning_type="lora", freeze_language_model=False), Reporter())
    model = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not any("lora" in name for name in model)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert adapter and all("lora" in name for name in adapter)


def test_a_directory_without_a_model_is_refused(parity_dir: Path, tmp_path: Path) -> None:
    task = replace(make_task(parity_dir, tmp_path / "run"), model_dir=tmp_path)
    with pytest.raises(ModelError, match=r"holds no model: it has no config\.json"):
        train_task(task, Reporter())


def test_a_model_of_another_family_is_refused(parity_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    task = make_task(parity_dir, tmp_path / "run", model_dir=tmp_path / "model")
    with pytest.raises(ModelError, match=r"holds a model of type 'llama': expected one of Gemma 3 \(gemma3\)"):
        train_task(task, Reporter())


def test_weights_that_do_not_fit_are_refused(parity_dir: Path, tmp_path: Path) -> None:
    """`from_pretrained` fills a missing key with random numbers and only warns."""
    from safetensors.torch import save_file

    shutil.copytree(parity_dir / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights.pop(next(name for name in weights if "layers.1.mlp.up_proj" in name))
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    task = make_task(parity_dir, tmp_path / "run", model_dir=tmp_path / "model")
    with pytest.raises(
        ModelError, match=r"do not fit the model: 1 missing keys, such as model\.language_model\.layers\.1"
    ):
        train_task(task, Reporter())
