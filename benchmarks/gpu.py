"""What a run takes on one GPU: speed, memory against its estimate, caches, resuming, cancelling, answers.

    python -m benchmarks.gpu               # one CUDA card, no network, about ten minutes, 30 GB of disk
    python -m benchmarks.gpu --dry-run     # every part that a CPU can run, on the demo's tiny model

The model has gemma-3-4b's shape and random weights. Results are written to a JSON after every part: `measured` is what
a clock or a counter said, `reckoned` what was counted without the device. A part that fails is a result too.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks import gpu_parts
from benchmarks.gpu_parts import Bench, write_recipe
from benchmarks.speed_case import make_data
from mllm_assets.worker.supervisor import tree

FORK = multiprocessing.get_context("fork")  # the parent touches no device: its children share what it imported
SHAPES: dict[str, dict[str, Any]] = {
    "projector": {
        "finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "learning_rate": 1.0e-4,
    },
    "last 2 layers and projector": {
        "finetuning_type": "freeze", "freeze_trainable_layers": 2, "freeze_multi_modal_projector": False,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 2.0e-5,
    },
    "LoRA": {
        "finetuning_type": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target": "all",
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "learning_rate": 1.0e-4,
    },
}  # fmt: skip
SAVE_STEPS, RESUMED_STEPS = 2, 4
SMALL = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
DRY_RUN = "A dry run on a CPU with a tiny model: it shows that the check works, and nothing of a GPU."


class Check:
    """All parts, one after another, each in a process of its own and within the time that is left."""

    def __init__(self, out: Path, root: Path, *, dry_run: bool, budget_s: float) -> None:
        self.out, self.dry_run = out, dry_run
        self.bench = Bench(root=root, device="cpu" if dry_run else "cuda")
        self.started_s = time.monotonic()
        self.ends_s = self.started_s + budget_s
        self.results: dict[str, Any] = {"note": DRY_RUN if dry_run else "", "parts": {}}

    def part(self, name: str, limit_s: float, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run one part and write down what it returned or how it failed."""
        patience = 10 if self.dry_run else 1  # a CPU may have others to serve
        self.part_ends_s = min(time.monotonic() + patience * limit_s, self.ends_s)
        began_s, before = time.monotonic(), os.times()
        print(f"{began_s - self.started_s:6.1f} s  {name}", flush=True)
        try:
            found = function(*args, **options)
        except Exception as error:  # of whatever kind: the other parts run all the same
            found = {"failed": f"{type(error).__name__}: {error}"[-2000:]}
            print(f"          failed: {found['failed']}", flush=True)
        after = os.times()
        cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
        found = {**found, "part_wall_s": time.monotonic() - began_s, "part_cpu_s": cpu_s}
        self.results["parts"][name] = found
        self.results["wall_s"] = time.monotonic() - self.started_s
        self.out.write_text(json.dumps(self.results, indent=1, default=str) + "\n", encoding="utf-8")
        return found

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run a function of gpu_parts in a process of its own, and return what it returned.

        Raises:
            RuntimeError: It raised, was killed, or took longer than its part may.
        """
        process = self.start(function, *args, **options)
        process.join(max(1.0, self.part_ends_s - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
            raise RuntimeError("ended at its time limit")
        return self.result_of(process)

    def start(self, function: Callable[..., Any], *args: Any, **options: Any) -> ForkProcess:
        answer = self.bench.root / "answer.json"
        answer.unlink(missing_ok=True)
        process = FORK.Process(target=_answer, args=(answer, function, (self.bench, *args), options))
        process.start()
        return process

    def result_of(self, process: ForkProcess) -> Any:
        answer = self.bench.root / "answer.json"
        if not answer.exists():
            raise RuntimeError(f"its process ended with {process.exitcode} and said nothing")
        found = json.loads(answer.read_text(encoding="utf-8"))
        if "raised" in found:
            raise RuntimeError(found["raised"])
        return found

    def recipe(self, name: str, shape: str, model: str, **values: Any) -> Path:
        own = {
            "model_name_or_path": f"pretrains/{model}", "stage": "sft", "do_train": True, "dataset_dir": "data",
            "dataset": "bench", "template": "gemma3", "cutoff_len": 2048, "output_dir": f"outputs/{name}",
            "dataloader_num_workers": 0 if self.dry_run else 4, "logging_steps": 1, "save_steps": 100000,
            "bf16": True, "max_steps": 5 if self.dry_run else 20, "seed": 42, "lr_scheduler_type": "cosine",
            **SHAPES[shape],
        }  # fmt: skip
        return write_recipe(self.bench.root / f"{name}.yaml", own | (SMALL if self.dry_run else {}) | values)

    def train(self, name: str, shape: str, model: str, **options: Any) -> dict[str, Any]:
        values = options.pop("values", {})
        return self.call(gpu_parts.train, self.recipe(name, shape, model, **values), **options)

    def resume(self, model: str) -> dict[str, Any]:
        """Two straight runs, and one that is killed with -9 behind its first checkpoint and started again."""
        values = {"max_steps": RESUMED_STEPS, "save_steps": SAVE_STEPS, **SMALL}
        folders = {}
        straight = ("straight",) if self.dry_run else ("straight", "straight_again")  # a CPU gives the same bits twice
        for name in straight:
            recipe = self.recipe(name, "LoRA", model, **values)
            folders[name] = Path(self.call(gpu_parts.train_whole, recipe)["run_dir"])
        recipe = self.recipe("killed", "LoRA", model, **values)
        process, outputs = self.start(gpu_parts.train_whole, recipe), self.bench.root / "outputs" / "killed"
        while process.is_alive() and time.monotonic() < self.part_ends_s:
            if any(outputs.glob(f"*/checkpoint-{SAVE_STEPS}/manifest.json")):
                break
            time.sleep(0.01)
        process.kill()
        process.join()
        found = self.call(gpu_parts.train_whole, recipe)
        folders["resumed"] = Path(found["run_dir"])
        weights = {
            name: load_file(folder / f"checkpoint-{RESUMED_STEPS}" / "trainable.safetensors")
            for name, folder in folders.items()
        }

        def apart(one: str, other: str) -> float:
            pairs = ((weights[one][key].double(), weights[other][key].double()) for key in weights[one])
            return max(float((a - b).abs().max()) for a, b in pairs)

        straight_apart, resumed_apart = apart(straight[0], straight[-1]), apart("straight", "resumed")
        return {"measured": {"straight_runs_apart": straight_apart, "resumed_run_apart": resumed_apart},
                "resumed_from_step": found["resumed_from_step"],
                "passed": found["resumed_from_step"] == SAVE_STEPS and resumed_apart <= straight_apart}  # fmt: skip

    def cancel(self, model: str) -> dict[str, Any]:
        """Ctrl-C while the command trains: how long it takes to end, and which of its processes stay."""
        recipe = self.recipe("cancelled", "projector", model, max_steps=1000, save_steps=1, **SMALL)
        command = [sys.executable, "-m", "mllm_assets.cli", "train", str(recipe), "--device", self.bench.device]
        environment = {**os.environ, "MLLM_ASSETS_ROOT": str(self.bench.root)}
        outputs = self.bench.root / "outputs" / "cancelled"
        with open(self.bench.root / "cancelled.log", "w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, preexec_fn=hear_interrupts)
            try:
                while process.poll() is None and time.monotonic() < self.part_ends_s - 15:
                    if any(outputs.glob("*/checkpoint-*/manifest.json")):
                        break
                    time.sleep(0.05)
                below, asked_s = tree(process.pid), time.monotonic()
                process.send_signal(signal.SIGINT)
                process.wait(max(1.0, self.part_ends_s - time.monotonic()))
            finally:
                process.kill()
        took_s = time.monotonic() - asked_s
        left = [pid for pid in below if Path(f"/proc/{pid}").exists()]
        shutil.rmtree(outputs, ignore_errors=True)
        return {"measured": {"ended_after_s": took_s, "num_processes": len(below), "num_left": len(left)},
                "exit_status": process.returncode, "passed": bool(below) and not left}  # fmt: skip

    def compare_losses(self, one: str, other: str) -> dict[str, Any]:
        first, second = (self.results["parts"][name]["measured"]["losses"] for name in (one, other))
        apart = max(abs(a - b) / abs(b) for a, b in zip(first, second, strict=True))
        return {"measured": {"relative_difference": apart}, "passed": apart < 0.01}

    def everything(self) -> None:
        bench, dry_run = self.bench, self.dry_run
        model, middle = ("tiny", "tiny") if dry_run else ("4b", "middle")
        self.part("versions", 60, self.call, gpu_parts.versions)
        if not dry_run:
            self.part("ceilings", 60, self.call, gpu_parts.ceilings)
        make_data(bench.root / "data", num_rows=16 if dry_run else 64)
        layers = {"num_layers": 0, "num_vision_layers": 0} if dry_run else {"num_layers": 34, "num_vision_layers": 27}
        self.part("model", 120, self.call, gpu_parts.make_model, model, **layers)
        self.part("features", 60, self.call, gpu_parts.features, bench.root / "pretrains" / model)
        first = self.part(
            "projector", 180, self.train, "projector", "projector", model, publishes=True, profiled=dry_run
        )
        if "run_dir" in first:
            self.part("answers", 60, self.call, gpu_parts.generate, Path(first["run_dir"]))
        self.part("last 2 layers and projector", 70, self.train, "last_2", "last 2 layers and projector", model)
        if not dry_run:  # which trains LoRA to resume it
            self.part("LoRA", 70, self.train, "lora", "LoRA", model)
        self.part("projector without a cache", 90, self.train, "no_cache", "projector", model, caches=False)
        self.part("a cache changes no loss", 5, self.compare_losses, "projector", "projector without a cache")
        if not dry_run:
            short = {"max_steps": 6, "gradient_accumulation_steps": 2}
            self.part(
                "projector, profiled", 70, self.train, "profiled", "projector", model, profiled=True, values=short
            )
            wide = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
            self.part("projector, micro-batches of 16", 70, self.train, "wide", "projector", model, values=wide)
            part = {"num_layers": 4, "num_vision_layers": 3}
            self.part("smaller model", 60, self.call, gpu_parts.make_model, middle, **part)
        self.part("resumed after kill -9", 120, self.resume, middle)
        self.part("cancelled", 90, self.cancel, middle)
        too_many = {"per_device_train_batch_size": 2**18 if dry_run else 2**12, "gradient_accumulation_steps": 1}
        too_big = self.recipe("too_big", "projector", model, disable_gradient_checkpointing=True, **too_many)
        self.part("refused", 60, self.call, gpu_parts.refuse, too_big)


def hear_interrupts() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _answer(path: Path, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    try:
        found = function(*args, **options)
    except Exception:  # of whatever kind: the parent process says it
        found = {"raised": traceback.format_exc(limit=-4)}
    path.write_text(json.dumps(found, default=str), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the results go")
    parser.add_argument("--work-dir", type=Path, help="a folder with 30 GB to spare; a temporary one without this")
    parser.add_argument("--budget-s", type=float, default=840, help="of all parts together; the rest is left out")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with the demo's tiny model")
    options = parser.parse_args()
    if options.work_dir is not None:
        options.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_", dir=options.work_dir) as folder:
        budget_s = math.inf if options.dry_run else options.budget_s
        check = Check(options.out, Path(folder), dry_run=options.dry_run, budget_s=budget_s)
        check.everything()
    parts = check.results["parts"]
    wrong = [name for name, found in parts.items() if "failed" in found or found.get("passed") is False]
    print(f"{len(parts)} parts, {len(wrong)} of them failed{': ' if wrong else ''}{', '.join(wrong)}: {options.out}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
