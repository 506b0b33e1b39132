"""Many rows: the time to the first step and the peak memory, before and after the rows are encoded.

`python -m benchmarks.many_rows [--rows 10000 1000000]` writes captions of 1,000 pictures as LLaMA-Factory's JSON, and
takes one step of the parity model, its projector alone. Planning and training are a process each, as in a run. The run
"new" has never read these rows, "encoded" is another run on the same rows. Wall-clock and CPU seconds are up to the end
of the first step, the import of libraries included; "helpers" is what the processes took that encode beside it. The
peak memory is that of the process, mapped files included, and "own" is what it holds at that step without them.
"ask" are predictions about all of these rows, up to the first batch that is scored.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

STEPS = ("plan", "train", "ask")
TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "parity" / "model"
NUM_PICTURES = 1000


class FirstStep(Exception):
    """Ends a training after its first step."""


def write_project(root: Path, num_rows: int) -> None:
    """`data/` with one entry, and nothing else: the model is used where it is."""
    from benchmarks.encode_rows import WORDS
    from mllm_assets.training.models.tiny import PROMPTS

    images, draw = root / "data" / "images", random.Random(0)
    images.mkdir(parents=True)
    for number in range(NUM_PICTURES):
        Image.new("RGB", (32, 32), (number % 256, number // 256, 0)).save(images / f"{number:04d}.png")
    with (root / "data" / "rows.json").open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            turns = [
                {"from": "human", "value": f"<image>{draw.choice(PROMPTS)}"},
                {"from": "gpt", "value": " ".join(draw.choices(WORDS, k=8))},
            ]
            row = {"conversations": turns, "images": [f"images/{number % NUM_PICTURES:04d}.png"]}
            file.write(("[" if number == 0 else ",\n") + json.dumps(row))
        file.write("]\n")
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"images": "images"}}
    (root / "data" / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    (root / "pretrains").mkdir()
    (root / "pretrains" / "tiny").symlink_to(TOKENIZER)


def recipe_of(root: Path, name: str) -> Any:
    from mllm_assets.recipe.load import load_recipe

    path = root / f"{name}.yaml"
    path.write_text(
        f"model_name_or_path: pretrains/tiny\nstage: sft\ndo_train: true\nfinetuning_type: full\ntemplate: gemma3\n"
        f"freeze_language_model: true\nfreeze_vision_tower: true\nfreeze_multi_modal_projector: false\ndataset: rows\n"
        f"dataset_dir: data\noutput_dir: outputs/{name}\nmax_steps: 2\nlearning_rate: 1.0e-3\n"
        f"per_device_train_batch_size: 2\ngradient_accumulation_steps: 1\nlogging_steps: 1\nuse_cpu: true\n"
    )
    return load_recipe(path)


def plan(root: Path, name: str) -> None:
    """What `mllm-assets train` does before it starts the trainer."""
    from mllm_assets.training.runs.plan import plan_run
    from mllm_assets.worker.tasks import to_json

    task = plan_run(recipe_of(root, name), root=root).task
    (root / f"{name}.json").write_text(json.dumps(to_json(task)))


def train(root: Path, name: str) -> None:
    """The trainer, up to its first step."""
    from mllm_assets.training.loop.engine import train_task
    from mllm_assets.worker.protocol import Reporter
    from mllm_assets.worker.tasks import from_json

    class UntilFirstStep(Reporter):
        def progress(self, stage: str, done: int, total: int, **facts: Any) -> None:
            if stage == "train" and done >= 1:
                raise FirstStep

    task: Any = from_json(json.loads((root / f"{name}.json").read_text()))
    try:
        train_task(task, UntilFirstStep())
    except FirstStep:
        return
    raise AssertionError("it ended before its first step")


def ask(root: Path, name: str) -> None:
    """Predictions about all rows, up to the first batch."""
    from mllm_assets.evaluation.predict import evaluate_task
    from mllm_assets.training.runs.models import model_fingerprint
    from mllm_assets.worker.protocol import Reporter
    from mllm_assets.worker.tasks import EvaluateTask, EvaluationSettings

    class UntilFirstBatch(Reporter):
        def progress(self, stage: str, done: int, total: int, **facts: Any) -> None:
            if stage.startswith("evaluate") and done >= 1:
                raise FirstStep

    model_dir, data_dir = root / "pretrains" / "tiny", root / "data"
    task = EvaluateTask(
        recipe=recipe_of(root, name).spec, recipe_name=name, entries=("rows",), model_dir=model_dir,
        base_model_dir=model_dir, data_dir=data_dir, data_digests={}, directory=root / "predictions" / name,
        model_digests=dict.fromkeys(("base", "tuned"), model_fingerprint(model_dir)), settings=EvaluationSettings(),
        features_root=root / "cache" / "features", rows_root=root / "cache" / "rows",
    )  # fmt: skip
    try:
        evaluate_task(task, UntilFirstBatch())
    except FirstStep:
        return
    raise AssertionError("it ended before its first batch")


def measured(root: Path, step: str, name: str) -> dict[str, float]:
    """Do a step in a process of its own; its wall-clock and CPU seconds and its peak in MiB."""
    command = [sys.executable, "-m", "benchmarks.many_rows", "--step", step, "--name", name, "--root", str(root)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **QUIET}).stdout
    return json.loads(output.splitlines()[-1])


QUIET = {"TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}


def main() -> None:
    """Print a line for each number of rows and each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    for flag in ("--step", "--name", "--root"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        began_s = time.monotonic()
        {"plan": plan, "train": train, "ask": ask}[arguments.step](Path(arguments.root), arguments.name)
        used, of_others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        cpu_s, peak_mib = used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
        held = psutil.Process().memory_info()
        own_mib = (held.rss - held.shared) / 2**20
        found = {"wall_s": time.monotonic() - began_s, "cpu_s": cpu_s, "peak_mib": peak_mib, "own_mib": own_mib}
        print(json.dumps({**found, "others_cpu_s": of_others.ru_utime + of_others.ru_stime}))
        return
    each = "wall s | CPU s | helpers | peak MiB | own MiB"
    print(f"| rows | run | plan: CPU s | peak MiB | train: {each} | ask: {each} | disk MiB |")
    print(f"|{'---|' * 15}")
    for num_rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder).resolve()
            write_project(root, num_rows)
            for name in ("new", "encoded"):
                planned, *others = (measured(root, step, name) for step in STEPS)
                size = sum(path.stat().st_size for path in root.glob("cache/rows/*/*/rows.arrow")) / 2**20
                cells = [f"{num_rows:,}", name, f"{planned['cpu_s']:.1f}", f"{planned['peak_mib']:.0f}"]
                for one in others:
                    cells += [f"{one[key]:.1f}" for key in ("wall_s", "cpu_s", "others_cpu_s")]
                    cells += [f"{one[key]:.0f}" for key in ("peak_mib", "own_mib")]
                print(f"| {' | '.join(cells)} | {size:.0f} |", flush=True)


if __name__ == "__main__":
    main()
