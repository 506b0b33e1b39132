"""Two processes on CPUs (gloo): the losses of one, and an exact resume after kill -9, replicated and sharded."""

import contextlib
import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from mllm_assets.artifacts import read_manifest
from mllm_assets.training.engine import train_task
from mllm_assets.training.launch import WorkerCrashed, run_worker
from mllm_assets.training.protocol import Reporter
from mllm_assets.training.spec import TrainSpec

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

NUM_STEPS = 16
FSDP = {"fsdp": True}


def make_request(parity_dir: Path, run_dir: Path, *, num_processes: int = 2, **overrides: Any) -> dict[str, Any]:
    values = {
        "model_name_or_path": "model", "dataset": "gemma3_vlm_train", "eval_dataset": "gemma3_vlm_val",
        "template": "gemma3", "do_train": True, "finetuning_type": "full", "freeze_multi_modal_projector": False,
        "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "per_device_train_batch_size": 2,
        "max_steps": NUM_STEPS, "logging_steps": 1, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 8,
    }  # fmt: skip
    return {
        "task": "train",
        "recipe": TrainSpec(**{**values, **overrides}).to_dict(),
        "model_dir": str(parity_dir / "model"),
        "data_dir": str(parity_dir / "data"),
        "run_dir": str(run_dir),
        "fingerprint": "f",
        "accelerator": {"device": "cpu", "num_threads": 1, "num_processes": num_processes},
    }


def losses(run_dir: Path, key: str = "loss") -> dict[int, float]:
    path = run_dir / "trainer_log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {line["current_steps"]: line[key] for line in lines if key in line}


def run_killed_at(step: int, request: dict[str, Any]) -> None:
    """Kill one rank with -9 once the log has the step; torchrun and the launcher do the rest."""

    def on_poll() -> None:
        if step in losses(Path(request["run_dir"])):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended by now
                    if child.environ().get("RANK") == "1":
                        child.send_signal(signal.SIGKILL)

    with pytest.raises(WorkerCrashed):
        run_worker(request, on_poll=on_poll)
    assert not (Path(request["run_dir"]) / "manifest.json").exists(), "it finished before the kill"


@pytest.fixture(scope="module")
def one_process(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    train_task(make_request(parity_dir, run_dir, gradient_accumulation_steps=2), Reporter())
    return run_dir


@pytest.mark.parametrize("how", [pytest.param({}, id="ddp"), pytest.param(FSDP, id="fsdp")])
def test_two_processes_give_the_losses_of_one_and_resume_to_the_same_bits(
    how: dict[str, Any], parity_dir: Path, tmp_path: Path, one_process: Path
) -> None:
    request = make_request(parity_dir, tmp_path / "whole", **how)
    whole = run_worker(request)
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

    request = make_request(parity_dir, tmp_path / "killed", **how)
    run_killed_at(6, request)
    resumed = run_worker(request)
    assert resumed["resumed_from_step"] in (4, 8)
    assert resumed["weights_digest"] == whole["weights_digest"]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for name in ("trainable.safetensors", "scheduler.pt"):
        assert (tmp_path / "killed" / last.name / name).read_bytes() == (last / name).read_bytes(), name
