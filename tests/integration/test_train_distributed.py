"""Two processes on CPUs (gloo): the losses of one, and an exact resume after kill -9, replicated and sharded."""

import contextlib
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from mllm_assets.artifacts import read_manifest
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.launch import WorkerCrashed, run_worker
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import TrainTask
from tests.interruption import losses, make_task

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

NUM_STEPS = 16
VALUES = {
    "finetuning_type": "full", "gradient_accumulation_steps": 1, "max_steps": NUM_STEPS, "save_steps": 4,
    "eval_steps": 8,
}  # fmt: skip
FSDP = {"fsdp": True}


def run_killed_at(step: int, task: TrainTask) -> None:
    """Kill one rank with -9 once the log has the step; torchrun and the launcher do the rest."""

    def on_poll() -> None:
        if step in losses(task.run_dir):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended by now
                    if child.environ().get("RANK") == "1":
                        child.send_signal(signal.SIGKILL)

    with pytest.raises(WorkerCrashed):
        run_worker(task, on_poll=on_poll)
    assert not (task.run_dir / "manifest.json").exists(), "it finished before the kill"


@pytest.fixture(scope="module")
def one_process(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    train_task(make_task(parity_dir, run_dir, **{**VALUES, "gradient_accumulation_steps": 2}), Reporter())
    return run_dir


@pytest.mark.parametrize("how", [pytest.param({}, id="ddp"), pytest.param(FSDP, id="fsdp")])
def test_two_processes_give_the_losses_of_one_and_resume_to_the_same_bits(
    how: dict[str, Any], parity_dir: Path, tmp_path: Path, one_process: Path
) -> None:
    task = make_task(parity_dir, tmp_path / "whole", num_processes=2, **VALUES, **how)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    whole = run_worker(task, env={"TMPDIR": str(temporary)})
    assert list(temporary.glob("torchelastic*")) == []  # torchrun's own choice is left there
    for key in ("loss", "eval_loss"):
        expected = losses(one_process, key)
        assert losses(tmp_path / "whole", key) == pytest.approx(expected, abs=1e-5, rel=0), key
    assert whole["reload"]["num_missing"] == whole["reload"]["num_unexpected"] == 0
    assert whole["num_trainable_params"] == read_manifest(one_process)["num_trainable_params"]

    last = tmp_path / "whole" / f"checkpoint-{NUM_STEPS}"
    sharding = "fsdp" if how else "none"
    assert read_manifest(last)["conditions"] == {
        "num_processes": 2, "precision": "float32 weights, no autocast", "sharding": sharding, "device": "cpu",
    }  # fmt: skip
    delta, delta_of_one = (
        load_file(run_dir / f"checkpoint-{NUM_STEPS}" / "trainable.safetensors")
        for run_dir in (tmp_path / "whole", one_process)
    )
    assert {name: tensor.shape for name, tensor in delta.items()} == {
        name: tensor.shape for name, tensor in delta_of_one.items()
    }
    published = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    published_by_one = load_file(one_process / "model" / "model.safetensors")
    assert published.keys() == published_by_one.keys()

    task = make_task(parity_dir, tmp_path / "killed", num_processes=2, **VALUES, **how)
    run_killed_at(6, task)
    resumed = run_worker(task)
    assert resumed["resumed_from_step"] in (4, 8)
    assert resumed["weights_digest"] == whole["weights_digest"]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for name in ("trainable.safetensors", "scheduler.pt"):
        assert (tmp_path / "killed" / last.name / name).read_bytes() == (last / name).read_bytes(), name
