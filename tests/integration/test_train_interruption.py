"""Killed at any instant and run again, a run ends with the weights of one that was never interrupted, bit for bit."""

import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from mllm_assets.artifacts import find_damage, read_manifest
from mllm_assets.errors import IntegrityError, MachineError, RecipeError
from mllm_assets.training.loop.checkpoints import checkpoint_dirs, find_resumable
from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.models import adapters
from mllm_assets.training.models.load import load_model
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import Accelerator, Manifest, TrainTask, to_json
from tests.interruption import NUM_STEPS, losses, make_task, run_until

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def whole_run(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train_task(make_task(parity_dir, run_dir, save_total_limit=2), Reporter())
    return run_dir


@pytest.fixture(scope="module")
def uninterrupted(whole_run: Path) -> dict[str, Any]:
    return read_manifest(whole_run)


@pytest.fixture
def unpublished(whole_run: Path, tmp_path: Path) -> Path:
    """A run as a kill between its last step and its manifest leaves it."""
    shutil.copytree(whole_run, tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    return tmp_path / "run"


def num_log_lines(run_dir: Path) -> int:
    path = run_dir / "trainer_log.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


@pytest.mark.attack("kill -9")
def test_killed_at_a_random_step_the_weights_are_the_same(
    parity_dir: Path, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """transformers' own resume loses every trained weight of Gemma 3 and says nothing."""
    step = random.randrange(7, NUM_STEPS - 2)
    task = make_task(parity_dir, tmp_path / "run")
    assert run_until(task, tmp_path, lambda run_dir: num_log_lines(run_dir) > step) == -signal.SIGKILL
    assert not (tmp_path / "run" / "manifest.json").exists()
    result = train_task(task, Reporter())
    assert result["resumed_from_step"] is not None and result["resumed_from_step"] >= 5, step
    assert result["weights_digest"] == uninterrupted["weights_digest"], step
    assert result["eval_loss"] == uninterrupted["eval_loss"]
    assert sorted(losses(tmp_path / "run")) == list(range(1, NUM_STEPS + 1)), "each step is in the log once"


@pytest.mark.attack("kill -9")
def test_killed_inside_a_save_the_half_written_checkpoint_does_not_count(
    parity_dir: Path, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    task = make_task(parity_dir, tmp_path / "run")

    def saving(run_dir: Path) -> bool:
        return (run_dir / "checkpoint-10").exists() and any(run_dir.glob(".checkpoint-*.tmp"))

    assert run_until(task, tmp_path, saving) == -signal.SIGKILL
    result = train_task(task, Reporter())
    assert result["resumed_from_step"] >= 10
    assert result["weights_digest"] == uninterrupted["weights_digest"]
    assert not list((tmp_path / "run").glob(".*.tmp"))


@pytest.mark.attack("kill -9")
def test_killed_after_the_last_step_no_further_step_is_done(
    parity_dir: Path, unpublished: Path, uninterrupted: dict[str, Any]
) -> None:
    """`Trainer.train` resumed at its last step does one more."""
    shown = io.StringIO()
    result = train_task(make_task(parity_dir, unpublished), Reporter(stream=shown))
    assert (
        f"resuming from {unpublished / 'checkpoint-40'} after step 40 of 40, to the same bits: weights, optimizer, "
        "schedule and random states are restored\n"
    ) in shown.getvalue()
    assert result["resumed_from_step"] == result["num_steps"] == NUM_STEPS
    assert result["weights_digest"] == uninterrupted["weights_digest"]


@pytest.mark.attack("damage")
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("bit", "trainable.safetensors does not match its digest"),
        ("missing", "optimizer.pt is missing"),
        ("no_manifest", "it has no readable manifest, so it was never finished"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_skipped(
    parity_dir: Path, unpublished: Path, uninterrupted: dict[str, Any], damage: str, reason: str
) -> None:
    """A missing optimizer file or one flipped bit is silent in the library."""
    assert [path.name for path in checkpoint_dirs(unpublished)] == ["checkpoint-35", "checkpoint-40"]
    victim = unpublished / "checkpoint-40"
    if damage == "bit":
        data = bytearray((victim / "trainable.safetensors").read_bytes())
        data[-1] ^= 1
        (victim / "trainable.safetensors").write_bytes(data)
    else:
        (victim / ("optimizer.pt" if damage == "missing" else "manifest.json")).unlink()
    result = train_task(make_task(parity_dir, unpublished), Reporter())
    assert result["skipped_checkpoints"] == [{"name": "checkpoint-40", "reason": reason}]
    assert f"checkpoint-40 is skipped: {reason}." in result["warnings"]
    assert result["resumed_from_step"] == 35
    assert result["weights_digest"] == uninterrupted["weights_digest"]
    assert find_damage(victim) is None, "it was written again"


def test_a_checkpoint_that_lacks_any_one_of_its_files_is_skipped(unpublished: Path) -> None:
    """Without its scheduler or random state a resume goes on with others, and the library says nothing."""
    newest = unpublished / "checkpoint-40"
    names = sorted(read_manifest(newest)["files"])
    assert {"trainable.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {*names}
    for name in names:
        (newest / name).rename(unpublished / "aside")
        resumable = find_resumable(unpublished)
        assert (resumable.step, resumable.skipped) == (35, [{"name": newest.name, "reason": f"{name} is missing"}])
        (unpublished / "aside").rename(newest / name)
    assert find_resumable(unpublished).step == 40


def test_resume_from_checkpoint_goes_on_with_weights_and_optimizer_of_the_named_one(
    parity_dir: Path, tmp_path: Path, whole_run: Path, uninterrupted: dict[str, Any]
) -> None:
    """The library loads no trained weight of Gemma 3 from it, and only warns."""
    task = replace(make_task(parity_dir, tmp_path / "run"), resume_from=whole_run / "checkpoint-35")
    result = train_task(task, Reporter())
    assert result["resumed_from_step"] == 35
    assert result["weights_digest"] == uninterrupted["weights_digest"]
    last = "checkpoint-40/optimizer.pt"
    assert (tmp_path / "run" / last).read_bytes() == (whole_run / last).read_bytes()


def test_a_longer_run_goes_on_with_the_schedule_of_its_own_length_and_says_so(
    parity_dir: Path, tmp_path: Path, whole_run: Path
) -> None:
    """It trained nothing, as the checkpoint's run was at its end, and recorded the new number of steps."""
    task = replace(make_task(parity_dir, tmp_path / "run", max_steps=44), resume_from=whole_run / "checkpoint-40")
    result = train_task(task, Reporter())
    assert (result["resumed_from_step"], result["num_steps"]) == (40, 44)
    assert any("checkpoint-40 is of a run of 40 steps, and this one has 44" in text for text in result["warnings"])
    log = (json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines())
    rates = {line["current_steps"]: line["lr"] for line in log if "lr" in line and line["current_steps"] > 40}
    num_warmup = math.ceil(0.1 * 44)
    expected = {
        step: 1e-3 * 0.5 * (1 + math.cos(math.pi * (step - 1 - num_warmup) / (44 - num_warmup)))
        for step in (41, 42, 43, 44)
    }
    assert rates == pytest.approx(expected)
    shorter = replace(make_task(parity_dir, tmp_path / "short", max_steps=20), resume_from=whole_run / "checkpoint-35")
    with pytest.raises(
        RecipeError, match=r"was saved after step 35, and max_steps is 20\. Raise it, or name an earlier"
    ):
        train_task(shorter, Reporter())


def test_a_damaged_checkpoint_that_the_recipe_names_is_refused(
    parity_dir: Path, tmp_path: Path, unpublished: Path
) -> None:
    named = unpublished / "checkpoint-35"
    (named / "scheduler.pt").unlink()
    task = replace(make_task(parity_dir, tmp_path / "other"), resume_from=named)
    with pytest.raises(IntegrityError, match=r"checkpoint-35 cannot be used: scheduler.pt is missing. Name another"):
        train_task(task, Reporter())
    assert not list((tmp_path / "other").glob("checkpoint-*"))


def test_going_on_in_another_precision_is_refused_with_what_to_set(parity_dir: Path, unpublished: Path) -> None:
    with pytest.raises(MachineError) as error:
        train_task(make_task(parity_dir, unpublished, bf16=True), Reporter())
    assert "checkpoint-40 cannot be resumed exactly here: precision was float32 weights, no autocast and is" in str(
        error.value
    )
    assert "To resume from it, set bf16, fp16 and pure_bf16 as they were" in str(error.value)


def test_the_run_keeps_its_number_of_threads(parity_dir: Path, unpublished: Path) -> None:
    """Sums in another order give other last bits."""
    task = replace(make_task(parity_dir, unpublished), accelerator=Accelerator(device="cpu", num_threads=2))
    assert train_task(task, Reporter())["num_threads"] == 1
    assert json.loads((unpublished / "run.json").read_text())["num_threads"] == 1


def test_a_checkpoint_of_another_trainable_set_is_refused(parity_dir: Path, unpublished: Path) -> None:
    with pytest.raises(IntegrityError, match=r"does not fit what trains: .* in it, expected .* Delete .*checkpoint-40"):
        train_task(make_task(parity_dir, unpublished, lora_rank=4), Reporter())


@pytest.mark.slow
@pytest.mark.attack("full disk")
def test_a_full_disk_is_said_and_the_last_good_checkpoint_stays(parity_dir: Path, tmp_path: Path) -> None:
    """The limit is the kernel's: from step 7 on no file may grow beyond 64 KiB, a third of the optimizer's."""
    task = make_task(parity_dir, tmp_path / "run")
    code = """
import json, resource, sys
from mllm_assets.training.loop import reporting
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import from_json

class Limiting(Reporter):
    def progress(self, stage, done, total, **facts):
        if stage == "train" and done == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))

from mllm_assets.errors import MllmAssetsError
try:
    train_task(from_json(json.load(open(sys.argv[1]))), Limiting())
except MllmAssetsError as error:
    print(type(error).__name__, error)
    sys.exit(2)
"""
    (tmp_path / "task.json").write_text(json.dumps(to_json(task)))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "task.json")], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 2, done.stderr
    said = (
        r"MachineError The disk is full: checkpoint-10 needs about \d{3} KiB in .*, and [\d.]+ GiB were free: a quota "
    )
    assert re.match(
        said + r"or a limit of file sizes allows less .*\. Free some space, or set save_total_limit: 1 in ",
        (done.stdout),
    ), done.stdout
    resumable = find_resumable(tmp_path / "run")
    assert resumable.step == 5 and resumable.skipped == []
    assert not list((tmp_path / "run").glob(".*.tmp"))


@pytest.mark.attack("full disk")
def test_a_full_disk_at_publication_is_said(parity_dir: Path, tmp_path: Path) -> None:
    task = make_task(parity_dir, tmp_path / "run", max_steps=2, eval_strategy="no", save_strategy="no")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (262_144, hard))
    try:
        with pytest.raises(MachineError, match=r"The disk is full: the trained model needs about"):
            train_task(task, Reporter())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "run" / "model").exists()
    assert train_task(task, Reporter())["num_steps"] == 2


def require_same_bits_from_step_5(task: TrainTask, whole: Manifest) -> None:
    """Take a finished run of ten steps back to its checkpoint of step 5, and train it to its end again."""
    for name in ("checkpoint-10", "model"):
        shutil.rmtree(task.run_dir / name)
    (task.run_dir / "manifest.json").unlink()
    resumed = train_task(task, Reporter())
    assert resumed["resumed_from_step"] == 5
    assert resumed["weights_digest"] == whole["weights_digest"]


@pytest.mark.slow
def test_oft_resumes_bit_for_bit_and_its_adapter_on_the_base_is_the_published_model(
    parity_dir: Path, tmp_path: Path
) -> None:
    """PEFT's unloading of OFT failed on a module that trains whole beside the adapters."""
    values = {"finetuning_type": "oft", "oft_block_size": 16, "module_dropout": 0.1, "max_steps": 10}
    task = make_task(parity_dir, tmp_path / "run", additional_target="multi_modal_projector", **values)
    whole = train_task(task, Reporter())
    base = load_model(parity_dir / "model")
    adapted = adapters.merged(PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")))
    published = load_model(tmp_path / "run" / "model")
    for (name, found), expected in zip(adapted.named_parameters(), published.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=1e-6), name
    require_same_bits_from_step_5(task, whole)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_frozen_weights_rates_and_noise(parity_dir: Path, tmp_path: Path) -> None:
    """PiSSA takes what stays frozen out of random draws, and no checkpoint holds it."""
    values = {
        "pissa_init": True, "pissa_iter": 4, "additional_target": "multi_modal_projector", "loraplus_lr_ratio": 4.0,
        "neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1, "max_steps": 10, "eval_strategy": "no",
        "max_samples": 8,  # so few that each is used again, and is cached
    }  # fmt: skip
    task = make_task(parity_dir, tmp_path / "run", cache_dir=tmp_path / "cache", **values)
    whole = train_task(task, Reporter())
    assert whole["caches"]["vision_features"] == "cached"
    assert whole["caches"]["hidden_states"].startswith("neftune_noise_alpha adds noise")
    assert not (tmp_path / "run" / "adapter").exists()
    require_same_bits_from_step_5(task, whole)
