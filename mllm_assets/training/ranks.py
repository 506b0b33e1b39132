"""This process's place among those of a run, from torchrun's variables: alone where there are none."""

import os


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process writes and reports for all."""
    return rank() == 0
