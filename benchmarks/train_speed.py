"""Training speed against plain transformers, and against TRL and LLaMA-Factory where they are installed.

    python benchmarks/train_speed.py [--rounds 2] [--bf16] [--quick]
    TRL_PYTHON=/path/to/its/venv/bin/python LLAMAFACTORY_PYTHON=... python benchmarks/train_speed.py

Same model, rows, order, batch (2), one thread, sdpa and precision; the trainers take turns, each run in a process of
its own. The plain baseline has its images decoded in memory and the processor in its collator. The engine starts each
run with an empty cache. CPU-seconds a step are medians over all rounds; the first steps are left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from speed_case import CASES, make_data, make_model, recipe_keys

VOCABULARIES = {"8k": 8_192, "262k": 262_208}
NUM_ROWS, NUM_STEPS, NUM_WARMUP_STEPS = 8, 8, 2
PYTHONS = {"trl": "TRL_PYTHON", "llamafactory": "LLAMAFACTORY_PYTHON"}  # variables: each is in a venv of its own
WORKER = Path(__file__).with_name("speed_worker.py")
HEADER = "| vocabulary | trains | trainer | CPU-s a step | wall s | gain | peak MiB | share | loss diff. | run, CPU-s |"


def run_once(trainer: str, case: str, model_dir: Path, data_dir: Path, *, bf16: bool) -> dict[str, Any]:
    """Run one trainer in a process of its own and return what it measured."""
    python = os.environ[PYTHONS[trainer]] if trainer in PYTHONS else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        request, result = Path(folder, "request.json"), Path(folder, "result.json")
        request.write_text(
            json.dumps(
                {
                    "trainer": trainer, "case": case, "model_dir": str(model_dir), "data_dir": str(data_dir),
                    "work_dir": folder, "recipe": recipe_keys(case, num_steps=NUM_STEPS, bf16=bf16),
                    "num_warmup_steps": NUM_WARMUP_STEPS,
                }
            )
        )  # fmt: skip
        threads = {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [python, str(WORKER), str(request), str(result)],
            env={**os.environ, **threads},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            sys.exit(f"{trainer}, {case}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(result.read_text())


def table_lines(vocabulary: str, case: str, runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """One line a trainer; gain, memory share and loss difference are against the plain baseline."""
    plain = runs["plain"]
    lines = []

    def median(some: list[dict[str, Any]], key: str) -> float:
        return statistics.median(value for run in some for value in run[key])

    for trainer, some in runs.items():
        cpu_s, wall_s = median(some, "step_cpu_s"), median(some, "step_wall_s")
        peak_mib = statistics.median(run["peak_memory_mib"] for run in some)
        share = peak_mib / statistics.median(run["peak_memory_mib"] for run in plain)
        difference = max(
            abs(a - b) for run, base in zip(some, plain, strict=True)
            for a, b in zip(run["losses"], base["losses"], strict=True)
        )  # fmt: skip
        total_s = statistics.median(run["total_cpu_s"] for run in some)
        gain = median(plain, "step_cpu_s") / cpu_s
        lines.append(
            f"| {vocabulary} | {case} | {trainer} | {cpu_s:.3f} | {wall_s:.3f} | {gain:.2f}x | {peak_mib:.0f} "
            f"| {share:.2f} | {difference:.1e} | {total_s:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast instead of float32")
    parser.add_argument("--long-captions", action="store_true", help="four times as many supervised tokens")
    parser.add_argument("--quick", action="store_true", help="one round of two cases with the large vocabulary")
    parser.add_argument("--case", choices=CASES, action="append", help="only these")
    parser.add_argument("--vocabulary", choices=VOCABULARIES, action="append", help="only these")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.vocabulary = 1, arguments.vocabulary or ["262k"]
        arguments.case = arguments.case or ["projector only", "last 2 layers + projector"]
    trainers = ["plain", "engine", *(name for name, variable in PYTHONS.items() if variable in os.environ)]
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder, "data")
        make_data(data_dir, num_rows=NUM_ROWS, long_captions=arguments.long_captions)
        lines = []
        shape: dict[str, Any] = {}
        for vocabulary in arguments.vocabulary or VOCABULARIES:
            model_dir = Path(folder, f"model_{vocabulary}")
            make_model(model_dir, vocab_size=VOCABULARIES[vocabulary])
            for case in arguments.case or CASES:
                runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
                for _ in range(arguments.rounds):
                    for trainer in trainers:
                        runs[trainer].append(run_once(trainer, case, model_dir, data_dir, bf16=arguments.bf16))
                shape = runs["plain"][0]
                lines += table_lines(vocabulary, case, runs)
                print("\n".join(lines[-len(trainers) :]), file=sys.stderr, flush=True)
    print(
        f"{arguments.rounds} rounds of {NUM_STEPS} steps, {'bf16' if arguments.bf16 else 'float32'}; rows of up to "
        f"{shape['num_tokens']} tokens, {shape['num_supervised']} of them supervised on average.\n"
    )
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
