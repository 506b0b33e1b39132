"""Kill -9 each kind of run twenty times at random moments and compare it with one that was never killed.

`make torture` writes what happened to benchmarks/torture.log and fails at the first bit that differs.
"""

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.interruption import CASES, SAVE_STEPS, KilledRun

REPOSITORY = Path(__file__).parents[1]
LOG = Path(__file__).with_name("torture.log")
KINDS = {"step": 0.55, "save": 0.35, "start": 0.1}  # what the moments are drawn from


def main() -> None:
    """Run every case, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each case")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the moments")
    parser.add_argument("--case", action="append", choices=CASES, help="all without this; may be given again")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    options = parser.parse_args()
    cases = options.case or list(CASES)
    started_s, num_different = time.monotonic(), 0
    kills = [options.kills] * len(cases), [f"{options.seed} {case}" for case in cases]
    with (
        LOG.open("w", encoding="utf-8") as log,
        ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        print(
            f"{options.kills} kills -9 of each case, seed {options.seed}; made by: make torture", file=log, flush=True
        )
        for lines, number in pool.map(torture, cases, *kills):
            print(*lines, sep="\n", file=log, flush=True)
            num_different += number
        took = f"{len(cases) * options.kills} kills, {num_different} differences, {time.monotonic() - started_s:.0f} s"
        print(took, file=log)
    print(f"{took}. See {LOG.name}.")
    sys.exit(num_different > 0)


def torture(case: str, num_kills: int, seed: str) -> tuple[list[str], int]:
    """Kill one run again and again and let it end; return what happened and how often something was not the same."""
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as in a worker that nobody spawned
    rng, lines, num_different, moments = random.Random(seed), [], 0, Counter[str]()

    def notify(text: str) -> None:
        lines.append(f"{case} {text}")
        print(lines[-1], flush=True)

    with tempfile.TemporaryDirectory(prefix="torture_") as folder:
        num_steps = (num_kills + 4) * SAVE_STEPS  # on the average a kill leaves fewer new steps than one save's
        run = KilledRun(case, REPOSITORY / "tests" / "golden" / "parity", Path(folder), num_steps=num_steps)
        for number in range(1, num_kills + 1):
            kill = run.kill(rng.choices(list(KINDS), list(KINDS.values()))[0], rng)
            num_different += not kill.is_exact
            moments["inside a save" if "inside" in kill.moment else kill.moment.split(":")[0]] += 1
            found = "no checkpoint yet" if not kill.kept_step else "same bits" if kill.is_exact else "DIFFERENT BITS"
            notify(f"kill {number:2} {kill.moment}; newest whole checkpoint {kill.kept_step}: {found}")
        for what, is_same in run.finish():
            num_different += not is_same
            notify(f"end of {num_steps} steps, {what}: {'same' if is_same else 'DIFFERENT'}")
    notify("kills: " + ", ".join(f"{number} {kind}" for kind, number in sorted(moments.items())))
    return lines, num_different


if __name__ == "__main__":
    main()
