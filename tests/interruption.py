"""Runs that are killed with -9 and must end as if they were not; the tests and benchmarks/torture.py share this."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import read_manifest
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.loop.checkpoints import find_resumable
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker import run as worker
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import Accelerator, TrainTask, to_json
from tests.worker_tasks import training

NUM_STEPS = 40
SAVE_STEPS = 5
# of a checkpoint; the others hold wall times
EXACT_FILES = ("trainable.safetensors", "optimizer.pt", "scheduler.pt")

# What has a state of its own that a resume must restore; the first is what `make_task` makes without overrides
CASES: dict[str, dict[str, Any]] = {
    "lora_accumulation": {},
    "loader_workers": {"finetuning_type": "full", "gradient_accumulation_steps": 1, "dataloader_num_workers": 2},
    "cached_features": {
        "finetuning_type": "full", "freeze_language_model": True, "metric_for_best_model": "chrf",  # of its answers
    },
    "cached_hidden_states": {
        "finetuning_type": "freeze", "freeze_trainable_layers": 1, "freeze_multi_modal_projector": True,
    },
    "drawn_answers": {
        "stage": "grpo", "reward": {"rouge_l": 1.0}, "num_generations": 2, "max_completion_length": 4, "beta": 0.05,
    },
}  # fmt: skip


def make_task(
    parity_dir: Path, run_dir: Path, *, num_processes: int = 1, cache_dir: Path | None = None, **overrides: Any
) -> TrainTask:
    """Shuffled rows, dropout, accumulation and warm-up: each has state that a resume must restore."""
    values = {
        "model_name_or_path": "model", "dataset": "gemma3_vlm_train", "eval_dataset": "gemma3_vlm_val",
        "template": "gemma3", "do_train": True, "finetuning_type": "lora", "lora_dropout": 0.1,
        "freeze_multi_modal_projector": False, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_steps": NUM_STEPS, "logging_steps": 1, "save_steps": SAVE_STEPS, "eval_strategy": "steps",
        "eval_steps": 10,
    }  # fmt: skip
    return training(
        TrainSpec(**{**values, **overrides}), model_dir=parity_dir / "model", data_dir=parity_dir / "data",
        run_dir=run_dir, accelerator=Accelerator(device="cpu", num_threads=1, num_processes=num_processes),
        cache_dir=cache_dir,
    )  # fmt: skip


def run_until(task: TrainTask, folder: Path, reached: Callable[[Path], bool]) -> int:
    """Start the real worker, wait for a moment, kill -9."""
    task_path = folder / "task.json"
    task_path.write_text(json.dumps(to_json(task)))
    command = [sys.executable, "-m", "mllm_assets.worker", str(task_path), str(folder / "result.json")]
    with (folder / "stderr.txt").open("w") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
    deadline = time.monotonic() + 240
    while not reached(task.run_dir):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.002)
        assert process.returncode is None, (folder / "stderr.txt").read_text()
        assert time.monotonic() < deadline, (folder / "stderr.txt").read_text()
    process.send_signal(signal.SIGKILL)
    return process.wait()


def losses(run_dir: Path, key: str = "loss") -> dict[int, float]:
    path = run_dir / "trainer_log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {line["current_steps"]: line[key] for line in lines if key in line}


def newest_logged_step(run_dir: Path, since_ns: int) -> int:
    """The last step that a process which started then has logged; what an earlier one left does not count."""
    path = run_dir / "trainer_log.jsonl"
    if not path.is_file() or path.stat().st_mtime_ns < since_ns:
        return 0
    lines = path.read_text().splitlines()
    return max((json.loads(line)["current_steps"] for line in lines if line.endswith("}")), default=0)


def is_saving(run_dir: Path, since_ns: int) -> bool:
    """Whether a process which started then is writing a checkpoint; before its first step it deletes an older one."""
    for staging in run_dir.glob(".checkpoint-*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # published by now
            if staging.stat().st_mtime_ns >= since_ns:
                return newest_logged_step(run_dir, since_ns) > 0
    return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """One kill and what was found after it: `kept_step` is that of the newest whole checkpoint."""

    moment: str
    kept_step: int
    is_exact: bool


# What a worker spends most of its start on; it is loaded once and forked for every kill
PRELOAD = ["mllm_assets.worker.run", "mllm_assets.training.loop.engine", "transformers.trainer", "peft",
           "transformers.models.gemma3.modeling_gemma3", "transformers.models.gemma3.processing_gemma3",
           "transformers.models.siglip.modeling_siglip", "torch._dynamo", "matplotlib.pyplot"]  # fmt: skip


def work(task: TrainTask, folder: Path) -> None:
    """The body of a worker's process."""
    multiprocessing.set_start_method("fork", force=True)  # as it is in a worker that nobody forked
    errors = os.open(folder / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    worker.run(task, folder / "result.json")


class KilledRun:
    """A run of one case that is killed again and again, beside one that never was.

    Args:
        case: A key of `CASES`.
        parity_dir: Model and data.
        folder: An empty one.
        num_steps: Optimizer steps of both runs.
    """

    def __init__(self, case: str, parity_dir: Path, folder: Path, *, num_steps: int) -> None:
        self._folder = folder
        self._tasks = {
            name: make_task(
                parity_dir, folder / name / "run", cache_dir=folder / name, **{**CASES[case], "max_steps": num_steps}
            )
            for name in ("whole", "killed")
        }
        self._last_step = num_steps
        self._fork = multiprocessing.get_context("forkserver")
        self._fork.set_forkserver_preload(PRELOAD)
        self.whole_dir, self.run_dir = (task.run_dir for task in self._tasks.values())
        self.whole = train_task(self._tasks["whole"], Reporter())

    def kill(self, kind: str, rng: random.Random) -> Kill:
        """Run on, kill -9 and compare what is left.

        Args:
            kind: `step`: a random time after a random step; `save`: as soon as a checkpoint begins to be written;
                `start`: a random time after the process started, mostly before the first step.
            rng: What chooses the moment.
        """
        begun = find_resumable(self.run_dir).step
        step = min(begun + rng.randint(1, 2 * SAVE_STEPS), self._last_step - 2)
        delay_s = rng.uniform(0, 2 if kind == "start" else 0.05)
        since_ns = time.time_ns()

        def reached(run_dir: Path) -> bool:
            if kind == "start":
                return time.time_ns() - since_ns > delay_s * 1e9
            if kind == "save":
                return is_saving(run_dir, since_ns)
            if newest_logged_step(run_dir, since_ns) < step:
                return False
            time.sleep(delay_s)
            return True

        self._run_until(reached)
        assert not (self.run_dir / "manifest.json").exists(), "it finished before the kill"
        logged, saving = newest_logged_step(self.run_dir, since_ns), is_saving(self.run_dir, since_ns)
        at = (f"at step {logged}" if logged else "before the first step") + (", inside a save" if saving else "")
        kept = find_resumable(self.run_dir)
        is_exact = kept.path is None or self._same_files(kept.path.name)
        return Kill(moment=f"{kind}: {at}", kept_step=kept.step, is_exact=is_exact)

    def _run_until(self, reached: Callable[[Path], bool]) -> None:
        process = self._fork.Process(target=work, args=(self._tasks["killed"], self._folder))
        process.start()
        deadline = time.monotonic() + 240
        while not reached(self.run_dir):
            process.join(0.002)
            assert process.exitcode is None and time.monotonic() < deadline, (self._folder / "stderr.txt").read_text()
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL

    def finish(self) -> Iterator[tuple[str, bool]]:
        """Run to the end; yield what was compared with the run that was never killed, and whether it is the same."""
        kept_step = find_resumable(self.run_dir).step
        result = train_task(self._tasks["killed"], Reporter())
        yield f"resumed from step {kept_step}", (result["resumed_from_step"] or 0) == kept_step
        yield "weights of the published model", result["weights_digest"] == self.whole["weights_digest"]
        yield "last checkpoint with its optimizer state", self._same_files(f"checkpoint-{self._last_step}")
        yield "evaluation loss", result["eval_loss"] == self.whole["eval_loss"]
        yield "answers at the last evaluation", result.get("eval_answers") == self.whole.get("eval_answers")
        yield "every step's loss, each once in the log", losses(self.run_dir) == losses(self.whole_dir)
        yield "what was cached", result["caches"] == self.whole["caches"]

    def _same_files(self, checkpoint: str) -> bool:
        here, there = (read_manifest(run / checkpoint)["files"] for run in (self.run_dir, self.whole_dir))
        return all(here[name] == there[name] for name in EXACT_FILES)
