"""Seconds to load the graph, against an empty Dagster components project: `python benchmarks/load_graph.py`."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOAD = "import importlib, sys; importlib.import_module(sys.argv[1]).defs().resolve_asset_graph()"


def make_empty_project(folder: Path) -> None:
    package = folder / "empty_project"
    (package / "defs").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "defs" / "__init__.py").touch()
    (package / "definitions.py").write_text(
        "from pathlib import Path\nimport dagster as dg\n\n\n@dg.definitions\ndef defs():\n"
        "    return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)\n"
    )
    (folder / "pyproject.toml").write_text(
        '[tool.dg]\ndirectory_type = "project"\n[tool.dg.project]\nroot_module = "empty_project"\n'
        'registry_modules = ["empty_project.components"]\n'
    )


def load_s(module: str, folder: Path) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", LOAD, module], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    repository = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        make_empty_project(Path(folder))
        empty, ours = [], []
        for _ in range(rounds + 1):  # the first round fills the caches
            empty.append(load_s("empty_project.definitions", Path(folder)))
            ours.append(load_s("mllm_assets.definitions", repository))
    empty_s, ours_s = statistics.median(empty[1:]), statistics.median(ours[1:])
    print(f"| empty components project | {empty_s:.2f} s |\n| this graph | {ours_s:.2f} s |")
    print(f"| ratio | {ours_s / empty_s:.2f} |")


if __name__ == "__main__":
    main()
