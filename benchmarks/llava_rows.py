"""Rows of LLaVA's form, from their JSON file to a checked directory: time, memory, and how long nobody is told.

`python -m benchmarks.llava_rows [--rows 20000]` writes a JSON list of conversations beside a folder of pictures, five
rows to a picture, and takes it through `add-dataset`, the four assets of a dataset and `check-data`, each in a process
of its own. It prints the table of RESULTS.md: wall-clock and CPU microseconds a row, the peak memory of the process and
of the largest one that decodes, and the longest time without a line of progress, and fails where a bound is passed.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ingest import WORDS, cpu_seconds, picture
from mllm_assets.data.curate.checks import (
    check_directory,
    every_image_has_a_placeholder,
    splits_share_no_image,
)
from mllm_assets.data.curate.register import register
from mllm_assets.data.curate.scaffold import add_dataset, as_spec
from mllm_assets.data.curate.splits import split
from mllm_assets.data.curate.variety import rows_say_different_things
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import DatasetSpec
from mllm_assets.data.quality.assess import assess
from mllm_assets.data.quality.decoding import end_workers
from mllm_assets.data.quality.report import write_report
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.layout import Layout
from mllm_assets.progress import EVERY_S, progress_to
from mllm_assets.safe_yaml import load_all

STEPS = ("add-dataset", "raw", "sample_quality", "splits", "dataset_info", "check-data")
ROWS_PER_PICTURE, EDGE_PX, TURNS = 5, 64, 2
MAX_PEAK_MIB, MAX_SILENCE_S = 1024, 6 * EVERY_S


def write_source(folder: Path, num_rows: int) -> None:
    """`llava.json`, row by row, and `images/`: as LLaVA's instructions are published, with ids and `<image>\\n`."""
    (folder / "images").mkdir(parents=True)
    chosen = random.Random(0)
    with (folder / "llava.json").open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            name = f"{number // ROWS_PER_PICTURE:09d}.jpg"
            if number % ROWS_PER_PICTURE == 0:
                picture(np.random.default_rng(number), EDGE_PX).save(folder / "images" / name, quality=90)
            turns = [
                {"from": speaker, "value": f"{number} {turn} " + " ".join(chosen.choices(WORDS, k=30))}
                for turn in range(TURNS)
                for speaker in ("human", "gpt")
            ]
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            row = {"id": f"{number:09d}", "image": name, "conversations": turns}
            file.write(("[" if number == 0 else ",\n") + json.dumps(row))
        file.write("]\n")


def run_step(root: Path, step: str) -> dict[str, Any]:
    """What the command, or the body of the asset, does; its seconds, peaks and longest silence."""
    started_s, cpu_s = time.monotonic(), cpu_seconds()
    told = [("start", started_s)]
    with progress_to(lambda line: told.append((line, time.monotonic()))):
        if step == "add-dataset":
            add_dataset(root / "llava", root, root)
            end_workers()
        elif step == "check-data":
            reports = list(check_directory(root / "data"))
            assert not any(report.problems for report in reports), reports[0].problems[:3]
            end_workers()
        else:
            run_asset(root, step)
    told_s = [at for _, at in told] + [time.monotonic()]
    longest = int(np.diff(told_s).argmax())
    own, decoders = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "wall_s": told_s[-1] - started_s,
        "cpu_s": cpu_seconds() - cpu_s,
        "peak_mib": round(own / 1024),
        "decoder_mib": round(decoders / 1024),
        "silence_s": told_s[longest + 1] - told_s[longest],
        "silent_after": told[longest][0],
    }


def run_asset(root: Path, asset: str) -> None:
    layout, spec = Layout(root), declared(root)
    raw, quality = made(layout.raw(spec.name, "any")), made(layout.quality(spec.name, "any"))
    match asset:
        case "raw":
            ingest(spec, layout)
        case "sample_quality":
            assert raw is not None
            write_report(raw, assess(spec, layout, raw, "run-1").directory)
            end_workers()
        case "splits":
            assert raw is not None and quality is not None
            version = split(spec, layout, raw, quality, "run-1").directory
            store = QualityStore(layout.quality_db)
            assert every_image_has_a_placeholder(version, layout.data).passed
            assert splits_share_no_image(version, layout.data, store=store).passed
            assert rows_say_different_things(version).passed
        case "dataset_info":
            version = made(layout.version(spec.name, "any"))
            assert version is not None
            register(spec, layout, version)


def declared(root: Path) -> DatasetSpec:
    [path] = root.glob("made/defs/datasets/*/defs.yaml")
    [values] = load_all(path)
    return as_spec(values["attributes"])


def made(any_of_them: Path) -> Path | None:
    return next((path.parent for path in any_of_them.parent.glob("*/manifest.json")), None)


def measure(root: Path, num_rows: int) -> bool:
    (root / "pyproject.toml").write_text('[tool.dg.project]\nroot_module = "made"\n')
    started_s = time.monotonic()
    write_source(root / "llava", num_rows)
    print(f"{num_rows:,} rows written in {time.monotonic() - started_s:.0f} s\n")
    print("| step | wall us a row | CPU us a row | peak MiB | of a decoder | longest silence, s |")
    print("|---|---|---|---|---|---|")
    results = []
    for step in STEPS:
        command = [sys.executable, "-m", "benchmarks.llava_rows", "--step", step, "--root", str(root)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results.append(found := json.loads(output.splitlines()[-1]))
        wall_us, cpu_us = (f"{1e6 * found[key] / num_rows:.0f}" for key in ("wall_s", "cpu_s"))
        peaks = f"{found['peak_mib']} | {found['decoder_mib']}"
        print(f"| {step} | {wall_us} | {cpu_us} | {peaks} | {found['silence_s']:.0f} |", flush=True)
        print(f"{step}: silent longest after {found['silent_after']!r}", file=sys.stderr, flush=True)
    wall_s, cpu_s = (sum(found[key] for found in results) for key in ("wall_s", "cpu_s"))
    peak_mib, silence_s = (max(found[key] for found in results) for key in ("peak_mib", "silence_s"))
    print(f"| all | {1e6 * wall_s / num_rows:.0f} | {1e6 * cpu_s / num_rows:.0f} | {peak_mib} | | {silence_s:.0f} |")
    return peak_mib <= MAX_PEAK_MIB and silence_s <= MAX_SILENCE_S


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step is not None:
        print(json.dumps(run_step(arguments.root, arguments.step)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return 0 if measure(Path(folder).resolve(), arguments.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
