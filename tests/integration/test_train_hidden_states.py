"""Cached hidden states: the same trajectory from the top layers alone, and the reason where they cannot serve."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mllm_assets.artifacts import MANIFEST, read_manifest, write_manifest
from mllm_assets.errors import IntegrityError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches.shards import TENSORS_FILE
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import TrainTask
from tests.worker_tasks import training

pytestmark = pytest.mark.integration


def make_task(parity_dir: Path, folder: Path, *, cached: bool = True, **overrides: Any) -> TrainTask:
    values = {
        "model_name_or_path": "model", "dataset": "gemma3_vlm_train", "eval_dataset": "gemma3_vlm_val",
        "template": "gemma3", "do_train": True, "finetuning_type": "freeze", "freeze_trainable_layers": 1,
        "learning_rate": 1e-3, "per_device_train_batch_size": 4, "max_steps": 16, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 8, "save_steps": 8,
    }  # fmt: skip
    return training(
        TrainSpec(**{**values, **overrides}), model_dir=parity_dir / "model", data_dir=parity_dir / "data",
        run_dir=folder / "run", cache_dir=folder if cached else None,
    )  # fmt: skip


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "run" / "trainer_log.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines]


@contextmanager
def counting_modules() -> Iterator[Counter[str]]:
    """Count forward calls by class name."""
    counts: Counter[str] = Counter()
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: counts.update([type(module).__name__])
    )
    try:
        yield counts
    finally:
        handle.remove()


@pytest.mark.parametrize("values", [
    {},
    {"finetuning_type": "lora", "lora_target": "layers.3.mlp.down_proj", "lora_dropout": 0.1},
    {"bf16": True},
], ids=["freeze", "lora", "bf16"])  # fmt: skip
def test_the_top_layers_alone_give_the_trajectory_of_the_whole_model(
    parity_dir: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    train_task(make_task(parity_dir, tmp_path / "whole", cached=False, **values), Reporter())
    result = train_task(make_task(parity_dir, tmp_path / "cached", **values), Reporter())
    assert result["caches"]["hidden_states"] == "cached below layer 3"
    tolerance = 2e-2 if values.get("bf16") else 5e-6
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "whole"), abs=tolerance)
    # what was put aside is published as it was
    model, other = (load_file(tmp_path / name / "run" / "model" / "model.safetensors") for name in ("cached", "whole"))
    assert model.keys() == other.keys()
    frozen = [name for name in model if not ("language_model" in name and ".layers.3." in name)]
    assert frozen and all(model[name].equal(other[name]) for name in frozen)


def test_no_frozen_layer_runs_while_training(parity_dir: Path, tmp_path: Path) -> None:
    from mllm_assets.training.loop.trainer import FineTuner

    in_steps: Counter[str] = Counter()
    step = FineTuner.training_step

    def counted(self: FineTuner, *args: Any, **kwargs: Any) -> torch.Tensor:
        with counting_modules() as counts:
            loss = step(self, *args, **kwargs)
        in_steps.update(counts)
        return loss

    with patch.object(FineTuner, "training_step", counted):
        train_task(make_task(parity_dir, tmp_path), Reporter())
    assert in_steps["Gemma3DecoderLayer"] == 16, "one layer a step"
    assert in_steps["SiglipVisionModel"] == in_steps["Gemma3MultiModalProjector"] == 0
    assert in_steps["Gemma3TextScaledWordEmbedding"] == 0


def test_a_second_recipe_with_the_same_frozen_part_computes_nothing(parity_dir: Path, tmp_path: Path) -> None:
    """The states were named by the model's folder too: in another folder the same model computed them again."""
    train_task(make_task(parity_dir, tmp_path), Reporter())
    shards = sorted((tmp_path / "hidden_states").glob("*/*"))
    elsewhere = shutil.copytree(parity_dir / "model", tmp_path / "elsewhere")
    other = make_task(parity_dir, tmp_path, learning_rate=1e-4, seed=7)
    other = replace(other, run_dir=tmp_path / "other", model_dir=elsewhere)
    train_task(other, Reporter())
    assert shards and sorted((tmp_path / "hidden_states").glob("*/*")) == shards


def test_states_that_are_not_the_models_are_refused(parity_dir: Path, tmp_path: Path) -> None:
    train_task(make_task(parity_dir, tmp_path), Reporter())
    [shard] = (tmp_path / "hidden_states").glob("*/*")
    names = read_manifest(shard)["names"]
    save_file({k: v + 0.5 for k, v in load_file(shard / TENSORS_FILE).items()}, shard / TENSORS_FILE)
    (shard / MANIFEST).unlink()
    write_manifest(shard, {"names": names})
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(IntegrityError, match=r"The cached hidden states of row .* differ from the model's by"):
        train_task(make_task(parity_dir, tmp_path), Reporter())
