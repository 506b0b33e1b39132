"""What twelve trials cost as one sweep, and as twelve runs one by one: `python benchmarks/sweep.py [median]`.

CPU-seconds of all processes; the same values, recipe and caches for both, each in a project of its own. Nothing is
given up early, unless the argument names a pruner. Half of the single runs come before the sweep and half after it.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

RATES = [round(1e-4 * 1.3**index, 8) for index in range(12)]
VALUES = {"freeze_vision_tower": True, "max_steps": 40, "eval_strategy": "steps", "eval_steps": 20, "save_steps": 20}


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def command(project: Path, *arguments: str) -> float:
    """Run one `mllm-assets` command in a project; returns the CPU-seconds that it took."""
    before = cpu_s()
    environment = {**os.environ, "DAGSTER_HOME": str(project / ".dagster_home"), "MLLM_ASSETS_ROOT": str(project)}
    done = subprocess.run(
        [sys.executable, "-m", "mllm_assets.cli", *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
    return cpu_s() - before


def prepared(folder: Path) -> Path:
    """A project with the recipe `tried`, its data, model and features made."""
    subprocess.run([sys.executable, "-m", "mllm_assets.cli", "init", str(folder)], check=True, capture_output=True)
    recipe: dict[str, Any] = yaml.safe_load((folder / "configs" / "emoji_sft.yaml").read_text())
    recipe |= {**VALUES, "output_dir": "outputs/tried", "report_to": "none", "plot_loss": False}
    (folder / "configs" / "tried.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    [settings] = folder.glob("*/defs/recipes/defs.yaml")
    component = yaml.safe_load(settings.read_text())
    sweep = {"parameters": {"learning_rate": RATES}, "num_trials": len(RATES), "pruner": (sys.argv[1:] or ["none"])[0]}
    component["attributes"].setdefault("settings", []).append({"recipe": "tried", "sweep": sweep})
    settings.write_text(yaml.safe_dump(component))
    command(folder, "run", "tried/vision_features")
    return folder


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        single, swept = prepared(Path(folder, "single")), prepared(Path(folder, "swept"))
        half = len(RATES) // 2
        alone = [command(single, "train", "configs/tried.yaml", f"learning_rate={rate}") for rate in RATES[:half]]
        together = command(swept, "run", "tried/sweep", "--only")
        alone += [command(single, "train", "configs/tried.yaml", f"learning_rate={rate}") for rate in RATES[half:]]
        [trials] = swept.glob("outputs/tried/sweep/*/trials.json")
        losses = [trial["eval_loss"] for trial in json.loads(trials.read_text()) if trial["eval_loss"] is not None]
    print(f"one by one: {sum(alone):.1f} CPU-s ({min(alone):.1f} to {max(alone):.1f} each)")
    print(
        f"one sweep:  {together:.1f} CPU-s, ratio {together / sum(alone):.2f}; {len(losses)} trained "
        f"to the end, best eval_loss {min(losses):.4f}"
    )


if __name__ == "__main__":
    main()
