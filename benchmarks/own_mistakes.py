"""SFT, then DPO on the model's own mistakes, on the emoji: `python benchmarks/own_mistakes.py [SEED ...]`.

Trains the emoji recipe, asks the model about its 560 training pictures, makes pairs of what it gets wrong, and trains
on them. Accuracy is of the 120 test pictures, the same for both models of a seed.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from mllm_assets.evaluation.gallery import rights_of

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for so many seeds
DPO = {
    "stage": "dpo", "pref_beta": 0.1, "pref_ftx": 0.2, "learning_rate": 2e-5, "max_steps": 60, "save_steps": 60,
    "eval_strategy": "no",
}  # fmt: skip


def command(project: Path, *arguments: str) -> None:
    environment = {**os.environ, "DAGSTER_HOME": str(project / ".dagster_home"), "MLLM_ASSETS_ROOT": str(project)}
    line = [sys.executable, "-m", "mllm_assets.cli", *arguments]
    done = subprocess.run(line, cwd=project, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")


def prepare(folder: Path, seeds: list[int]) -> None:
    """A project with two recipes for each seed."""
    subprocess.run([sys.executable, "-m", "mllm_assets.cli", "init", str(folder)], check=True, capture_output=True)
    recipe: dict[str, Any] = yaml.safe_load((folder / "configs" / "emoji_sft.yaml").read_text())
    [settings] = folder.glob("*/defs/recipes/defs.yaml")
    component = yaml.safe_load(settings.read_text())
    for seed in seeds:
        first = recipe | {"seed": seed, "output_dir": f"outputs/first_{seed}", "report_to": "none", "plot_loss": False}
        second = first | DPO | {
            "dataset": f"first_{seed}_preferences", "model_name_or_path": f"outputs/first_{seed}/latest/model",
            "output_dir": f"outputs/second_{seed}",
        }  # fmt: skip
        for name, value in ((f"first_{seed}", first), (f"second_{seed}", second)):
            (folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(value, sort_keys=False))
        component["attributes"].setdefault("settings", []).append({"recipe": f"first_{seed}", "preferences": True})
    settings.write_text(yaml.safe_dump(component))


def measured(folder: Path, seed: int) -> tuple[list[bool], list[bool], int]:
    """Which test pictures the model of each stage is right about, and the number of pairs."""
    [answers] = folder.glob(f"outputs/second_{seed}/predictions/*/predictions.parquet")
    table = pq.read_table(answers)
    rights = [bool(right) for right in rights_of(table)]
    models = table["model"].to_pylist()
    sides = [[right for right, of in zip(rights, models, strict=True) if of == model] for model in ("base", "tuned")]
    [manifest] = folder.glob(f"data/.preferences/first_{seed}/*/manifest.json")
    return sides[0], sides[1], json.loads(manifest.read_text())["num_pairs"]


def main() -> None:
    seeds = [int(text) for text in sys.argv[1:]] or [42, 43, 44]
    gains: list[float] = []
    each: list[int] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "project")
        prepare(folder, seeds)
        for seed in seeds:
            command(folder, "run", f"second_{seed}/predictions")
            before, after, num_pairs = measured(folder, seed)
            shares = [sum(side) / len(side) for side in (before, after)]
            gains.append(shares[1] - shares[0])
            each += [int(b) - int(a) for a, b in zip(before, after, strict=True)]
            line = f"seed {seed}: {num_pairs} pairs, SFT {shares[0]:.3f}, then DPO {shares[1]:.3f} of {len(after)}"
            print(line, flush=True)
    mean = statistics.mean(gains)
    if len(gains) in T_95:
        half = T_95[len(gains)] * statistics.stdev(gains) / math.sqrt(len(gains))
        print(f"gain {mean:+.3f}, 95 % over {len(gains)} seeds {mean - half:+.3f} to {mean + half:+.3f}")
    half = 1.96 * statistics.stdev(each) / math.sqrt(len(each))
    print(f"over {len(each)} answers {mean - half:+.3f} to {mean + half:+.3f}")


if __name__ == "__main__":
    main()
