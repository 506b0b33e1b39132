"""Killed three times at random moments, every kind of run ends as one that never was; `make torture` kills twenty."""

import random
from pathlib import Path

import pytest

from tests.interruption import CASES, KilledRun

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.attack("kill -9")]


@pytest.mark.parametrize("case", CASES)
def test_killed_three_times_weights_and_optimizer_are_the_same_bit_for_bit(
    case: str, parity_dir: Path, tmp_path: Path
) -> None:
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    run = KilledRun(case, parity_dir, tmp_path, num_steps=30)
    for kind in ("step", "save", "step"):
        kill = run.kill(kind, rng)
        assert kill.is_exact, (seed, kill)
    for what, is_same in run.finish():
        assert is_same, (seed, what)
