"""CPU-seconds of the process of a run's step before its asset, in projects of 10 and of 500 datasets and recipes.

Each definition is a copy of the emoji's: `python benchmarks/step_processes.py [--sizes 10 500]`. The wall clock is not
measured; what is counted is the CPU time of the process, and how often a run builds the definitions.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mllm_assets.project.create import create_project

PROBE = """import json
import time
from pathlib import Path

import dagster as dg

FOUND = Path(__file__).with_name("found.jsonl")


def probe(number):
    @dg.asset(key=["probe", str(number)], deps=[["probe", str(number - 1)]] if number else [])
    def asset():
        with FOUND.open("a") as file:
            file.write(json.dumps(time.process_time()) + "\\n")

    return asset


assets = [probe(number) for number in range(3)]
"""
RUN = """import sys
import time
from pathlib import Path

import dagster as dg
from mllm_assets.components.instance.location import Location

keys = [dg.AssetKey(["probe", str(number)]) for number in range(3)]
job = Location(Path.cwd()).job("__ASSET_JOB")
print(time.process_time(), flush=True)
with dg.DagsterInstance.get() as instance:
    assert dg.execute_job(job, instance=instance, asset_selection=keys).success
"""


def make_project(folder: Path, num_lines: int) -> None:
    create_project(folder, name="many")
    defs = folder / "many" / "defs"
    dataset = (defs / "datasets" / "emoji" / "defs.yaml").read_text()
    recipe = (folder / "configs" / "emoji_sft.yaml").read_text()
    for number in range(num_lines):
        own = defs / "datasets" / f"emoji{number}"
        own.mkdir()
        (own / "defs.yaml").write_text(dataset.replace("name: emoji", f"name: emoji{number}"))
        text = recipe.replace("emoji_train", f"emoji{number}_train").replace("emoji_val", f"emoji{number}_val")
        (folder / "configs" / f"line{number}.yaml").write_text(text.replace("emoji_sft", f"line{number}"))
    (defs / "probe.py").write_text(PROBE)


def measure(folder: Path) -> tuple[float, list[float]]:
    """CPU-seconds until the run's process has the definitions, and of each step's process until its body."""
    environment = {**os.environ, "DAGSTER_HOME": str(folder / ".dagster_home")}
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", RUN]
    run = subprocess.run(
        command, cwd=folder, env={**environment, "PYTHONPATH": path}, check=True, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    found = folder / "many" / "defs" / "found.jsonl"
    return float(run.stdout.split()[0]), [json.loads(line) for line in found.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 500])
    print("| datasets and recipes | the run's process, CPU-s | each of 3 steps' processes, CPU-s |\n|---|---|---|")
    for size in parser.parse_args().sizes:
        with tempfile.TemporaryDirectory() as root:
            make_project(Path(root) / "many_lines", size)
            run_s, steps_s = measure(Path(root) / "many_lines")
        print(f"| {size} each | {run_s:.2f} | {', '.join(f'{step:.2f}' for step in steps_s)} |", flush=True)


if __name__ == "__main__":
    main()
