"""Seconds and memory to group hashes, random and clustered: `python benchmarks/grouping.py`."""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Inputs = tuple[NDArray[np.uint64], NDArray[np.uint8]]
sys.path.insert(0, str(Path(__file__).parents[1]))


def flipped(hashes: NDArray[np.uint64], num_bits: int, random: np.random.Generator) -> NDArray[np.uint64]:
    for _ in range(num_bits):
        hashes = hashes ^ (np.uint64(1) << random.integers(0, 64, len(hashes), dtype=np.uint64))
    return hashes


def gray(count: int) -> NDArray[np.uint8]:
    return np.full((count, 48), 128, np.uint8)


def random_hashes(count: int, random: np.random.Generator) -> NDArray[np.uint64]:
    return random.integers(0, 2**64, count, dtype=np.uint64)


def spread(count: int, random: np.random.Generator) -> Inputs:
    return random_hashes(count, random), gray(count)


def copies(count: int, random: np.random.Generator) -> Inputs:
    hashes = random_hashes(count, random)
    hashes[: count // 100] = hashes[0]
    return hashes, gray(count)


def blank_shapes(count: int, random: np.random.Generator) -> Inputs:
    """One hash in a hundredth of the images, each in colours of its own: the colours must tell them apart."""
    hashes, _ = copies(count, random)
    return hashes, random.integers(0, 256, (count, 48), dtype=np.uint8)


def bursts(count: int, random: np.random.Generator) -> Inputs:
    """Pictures of a hundred near-duplicates each, as of a camera's bursts."""
    centres = np.repeat(random_hashes(count // 100, random), 100)
    return flipped(centres, 3, random), gray(len(centres))


def balls(count: int, random: np.random.Generator) -> Inputs:
    centres = np.repeat(random_hashes(max(count // 10_000, 1), random), 10_000)
    return flipped(centres, 3, random), gray(len(centres))


def chain(count: int, random: np.random.Generator) -> Inputs:
    """Each one bit from the next, first and last far apart."""
    numbers = np.arange(count, dtype=np.uint64)
    return numbers ^ (numbers >> np.uint64(1)), gray(count)


def heavy_band(count: int, random: np.random.Generator) -> Inputs:
    """All share the first 13 bits, so a band of a plain join holds every one."""
    return random.integers(0, 2**51, count, dtype=np.uint64), gray(count)


CASES: dict[str, tuple[str, Callable[[int, np.random.Generator], Inputs]]] = {
    "random": ("random", spread),
    "copies": ("a hundredth of them identical", copies),
    "blank_shapes": ("a hundredth of one hash, in other colours each", blank_shapes),
    "bursts": ("groups of 100 near-duplicates", bursts),
    "balls": ("groups of 10,000 within 6 bits of each other", balls),
    "chain": ("one chain, each a bit from the next", chain),
    "heavy_band": ("13 leading bits shared by all", heavy_band),
}


def measure(case: str, count: int, seed: int) -> None:
    from mllm_assets.data.quality.grouping import near_forest

    hashes, colors = CASES[case][1](count, np.random.default_rng(seed))
    near_forest(hashes[:10], colors[:10], distance_bits=4, color_distance=8.0)  # imports
    started, started_cpu = time.perf_counter(), time.process_time()
    forest = near_forest(hashes, colors, distance_bits=4, color_distance=8.0)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(wall_s, cpu_s, peak_gib, forest.num_compared, len(hashes) - len(forest.a_E))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-hashes", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=CASES, help="measure one case once, and print its numbers")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.case:
        measure(arguments.case, arguments.num_hashes, arguments.seed)
        return
    print("| hashes | wall s | CPU s | peak GiB | million pairs compared | groups |\n|---|---|---|---|---|---|")
    for case, (title, _) in CASES.items():
        rounds = []
        for seed in range(arguments.rounds):
            command = [sys.executable, __file__, "--case", case, "--seed", str(seed)]
            command += ["--num-hashes", str(arguments.num_hashes)]
            rounds.append([float(x) for x in subprocess.check_output(command, text=True).split()])
        wall_s, cpu_s, peak_gib, compared, groups = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"| {title} | {wall_s:.1f} | {cpu_s:.1f} | {peak_gib:.2f} | {compared / 1e6:,.0f} | {groups:,.0f} |")


if __name__ == "__main__":
    main()
