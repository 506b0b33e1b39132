"""Runs of equal values in sorted arrays: each member's run by number, and what is asked of the runs.

Run numbers of N members do not fall; members of one run are neighbours.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def run_numbers(runs_N: NDArray[np.int64], keys_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Number the runs of equal keys within each run, from 0."""
    return np.cumsum(_begins(runs_N) | _begins(keys_N)) - 1


def starts(runs_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each run begins."""
    return np.flatnonzero(_begins(runs_N))


def lengths(runs_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """The length of each member's run."""
    of_run = np.diff(_bounds(runs_N))
    return np.repeat(of_run, of_run)


def per_member(values_R: NDArray, runs_N: NDArray[np.int64]) -> NDArray:
    """Give each member the value of its run."""
    return np.repeat(values_R, np.diff(_bounds(runs_N)))


def slices(runs_N: NDArray[np.int64]) -> Iterator[slice]:
    """Where each run lies."""
    bounds = _bounds(runs_N).tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        yield slice(start, end)


def _begins(values_N: NDArray) -> NDArray[np.bool_]:
    begins = np.ones(len(values_N), bool)
    begins[1:] = values_N[1:] != values_N[:-1]
    return begins


def _bounds(runs_N: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.append(starts(runs_N), len(runs_N))
