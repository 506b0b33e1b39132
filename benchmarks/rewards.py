"""SFT briefly, then GRPO, on eight pictures of shapes: `python benchmarks/rewards.py [SEED ...]`.

How far the mean reward rises in five CPU-minutes of steps, of 64 answers to the eight questions at each step.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from mllm_assets.training.models.tiny import build
from tests.shapes import BRIEFLY, REWARDED, trained, write_shapes

NUM_STEPS = 300
MEAN_OF = 20  # steps


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "model")
        data_dir = write_shapes(folder / "data")
        for seed in [int(text) for text in sys.argv[1:]] or [42, 43, 44]:
            first, second = folder / f"sft-{seed}", folder / f"grpo-{seed}"
            trained({**BRIEFLY, "seed": seed}, folder / "model", data_dir, first)
            started_s = time.process_time()
            values = {**REWARDED, "max_steps": NUM_STEPS, "warmup_steps": 10, "seed": seed}
            log = trained(values, first / "model", data_dir, second)
            spent_s = time.process_time() - started_s
            rewards = [line["reward"] for line in log]
            means = [statistics.mean(rewards[place : place + MEAN_OF]) for place in range(0, NUM_STEPS, MEAN_OF)]
            first_above = next((place * MEAN_OF for place, mean in enumerate(means, 1) if mean > 0.8), None)
            print(
                f"seed {seed}: {rewards[0]:.3f} at the first step, {means[-1]:.3f} over the last {MEAN_OF} of "
                f"{NUM_STEPS}, above 0.8 from step {first_above}; {spent_s:.0f} CPU-seconds; "
                f"{log[-1]['frac_reward_zero_std']:.2f} of the questions without a gradient at the end",
                flush=True,
            )


if __name__ == "__main__":
    main()
