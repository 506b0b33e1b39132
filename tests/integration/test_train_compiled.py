"""A run whose text layers are compiled: the same losses within rounding, and the same bits after a kill."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.loop.fitting import CHECKPOINTED
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import TrainTask
from tests.integration.test_train_hidden_states import losses, make_task

pytestmark = [pytest.mark.integration, pytest.mark.slow]
VALUES = {"finetuning_type": "lora", "lora_rank": 4, "max_steps": 4, "save_steps": 2, "eval_strategy": "no"}


def begun(task: TrainTask) -> TrainTask:
    """A run that computes activations twice, which on the CPU only one does that began so."""
    task.run_dir.mkdir(parents=True)
    (task.run_dir / "run.json").write_text(json.dumps({CHECKPOINTED: True}))
    return task


def test_compiled_layers_train_the_same_with_activations_computed_twice_and_resume_exactly(
    parity_dir: Path, tmp_path: Path
) -> None:
    plain = make_task(parity_dir, tmp_path / "plain", cached=False, **VALUES)
    train_task(plain, Reporter())
    values = {**VALUES, "torch_compile": True}
    straight = begun(make_task(parity_dir, tmp_path / "straight", cached=False, **values))
    manifest = train_task(straight, Reporter())
    assert losses(tmp_path / "straight") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)

    resumed = begun(make_task(parity_dir, tmp_path / "resumed", cached=False, **values))
    shutil.copytree(straight.run_dir / "checkpoint-2", resumed.run_dir / "checkpoint-2")
    again = train_task(resumed, Reporter())
    assert (again["resumed_from_step"], again["weights_digest"]) == (2, manifest["weights_digest"])
    one, other = (load_file(task.run_dir / "checkpoint-4" / "trainable.safetensors") for task in (plain, straight))
    assert one.keys() == other.keys(), "names are those of a run that compiles nothing"
