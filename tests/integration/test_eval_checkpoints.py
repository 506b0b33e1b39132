"""A checkpoint as a whole model: what the run started from, with what was trained put over it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_assets.artifacts import write_manifest
from mllm_assets.errors import IntegrityError, ModelError
from mllm_assets.inference.answerer import Answerer
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.loop.checkpoints import load_checkpoint
from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.models.load import load_model
from mllm_assets.worker.protocol import Reporter
from tests.worker_tasks import training

pytestmark = pytest.mark.integration

KINDS: dict[str, dict[str, Any]] = {
    "projector": {"finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False},
    "lora": {"finetuning_type": "lora", "lora_rank": 4},
    "lora_bf16": {"finetuning_type": "lora", "lora_rank": 4, "bf16": True},
}


def trained(parity_dir: Path, run_dir: Path, **values: Any) -> Path:
    """Four steps with a checkpoint after every second one."""
    recipe = {
        "model_name_or_path": "model", "dataset": "gemma3_vlm_train", "template": "gemma3", "do_train": True,
        "learning_rate": 5e-3, "max_steps": 4, "save_steps": 2, "logging_steps": 1,
    }  # fmt: skip
    spec = TrainSpec(**{**recipe, **values})
    task = training(spec, model_dir=parity_dir / "model", data_dir=parity_dir / "data", run_dir=run_dir)
    train_task(task, Reporter())
    return run_dir


@pytest.fixture(scope="module")
def lora_run(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(parity_dir, tmp_path_factory.mktemp("lora") / "run", **KINDS["lora"])


@pytest.mark.parametrize("kind", ["projector", pytest.param("lora_bf16", marks=pytest.mark.slow)])
def test_the_last_checkpoint_is_the_published_model(parity_dir: Path, tmp_path: Path, kind: str) -> None:
    run_dir = trained(parity_dir, tmp_path / "run", **KINDS[kind])
    assert_same(load_checkpoint(run_dir / "checkpoint-4"), load_model(run_dir / "model"))


def test_the_last_lora_checkpoint_is_the_published_model_and_an_earlier_one_another(lora_run: Path) -> None:
    assert_same(load_checkpoint(lora_run / "checkpoint-4"), load_model(lora_run / "model"))
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    weights = [load_checkpoint(lora_run / f"checkpoint-{step}").state_dict()[name] for step in (2, 4)]
    assert not torch.equal(*weights)


def test_a_checkpoint_answers_and_is_scored(lora_run: Path) -> None:
    checkpoint, model = Answerer(lora_run / "checkpoint-4"), Answerer(lora_run / "model")
    assert checkpoint.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert_same(checkpoint.model, model.model)


def test_damage_another_base_model_and_foreign_tensors_are_refused(
    lora_run: Path, parity_dir: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "outputs" / "run"
    shutil.copytree(lora_run, run_dir)
    shutil.copytree(parity_dir / "model", tmp_path / "model")
    kept = json.loads((run_dir / "run.json").read_text())
    kept["starts_from"]["model_dir"] = "../../model"
    (run_dir / "run.json").write_text(json.dumps(kept))
    load_checkpoint(run_dir / "checkpoint-2")

    file = run_dir / "checkpoint-2" / "trainable.safetensors"
    tensors = load_file(file)
    save_file({name: tensors[name] for name in list(tensors)[1:]}, file, {"format": "pt"})
    with pytest.raises(IntegrityError, match=r"checkpoint-2 cannot be used: .* Choose another one of"):
        load_checkpoint(run_dir / "checkpoint-2")
    write_manifest(run_dir / "checkpoint-2", {"step": 2})
    with pytest.raises(IntegrityError, match=r"does not fit what trains: .* is absent in it, expected"):
        load_checkpoint(run_dir / "checkpoint-2")

    (tmp_path / "model" / "generation_config.json").write_text("{}")
    with pytest.raises(IntegrityError, match="and another model is there now. Put the model back"):
        load_checkpoint(run_dir / "checkpoint-4")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ModelError, match="hold only what was trained, and the model that they were trained from"):
        load_checkpoint(run_dir / "checkpoint-4")
    (run_dir / "run.json").unlink()
    with pytest.raises(ModelError, match="does not say which model it started from"):
        load_checkpoint(run_dir / "checkpoint-4")


def assert_same(model: Any, expected: Any) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
