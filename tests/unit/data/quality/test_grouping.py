"""Grouping is exact, also where hashes are clustered, and stays far from comparing every two."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from mllm_assets.data.quality import grouping
from mllm_assets.data.quality.grouping import near_forest

pytestmark = pytest.mark.not_fast

Hashes = NDArray[np.uint64]


def gray(count: int) -> NDArray[np.uint8]:
    return np.full((count, 48), 128, np.uint8)


def flipped(hashes: Hashes, num_bits: int, random: np.random.Generator) -> Hashes:
    for _ in range(num_bits):
        hashes = hashes ^ (np.uint64(1) << random.integers(0, 64, len(hashes), dtype=np.uint64))
    return hashes


def ball(count: int, random: np.random.Generator) -> Hashes:
    return flipped(np.full(count, 0x0123456789ABCDEF, np.uint64), 3, random)


def chain(count: int, random: np.random.Generator) -> Hashes:
    numbers = np.arange(count, dtype=np.uint64)
    return numbers ^ (numbers >> np.uint64(1))


def heavy_band(count: int, random: np.random.Generator) -> Hashes:
    return random.integers(0, 2**45, count, dtype=np.uint64)


def mixed(count: int, random: np.random.Generator) -> Hashes:
    """Random hashes, each with near copies, blank ones, and a band that half of them share."""
    some = random.integers(0, 2**64, count // 4, dtype=np.uint64)
    blank = np.full(count // 4, 1 << 63, np.uint64)
    return np.concatenate([some, flipped(some, 3, random), blank, heavy_band(count // 4, random)])


def brute_groups(hashes: Hashes, colors: NDArray[np.uint8], bits: int, color: float) -> list[int]:
    groups = list(range(len(hashes)))

    def find(node: int) -> int:
        while groups[node] != node:
            node = groups[node]
        return node

    for one in range(len(hashes)):
        near = np.bitwise_count(hashes[one:] ^ hashes[one]) <= bits
        near &= np.abs(colors[one:].astype(int) - colors[one]).mean(axis=1) <= color
        for other in one + np.flatnonzero(near):
            groups[find(int(other))] = find(one)
    roots = [find(node) for node in range(len(hashes))]
    return [roots.index(root) for root in roots]


@pytest.mark.parametrize("bits", [0, 1, 4, 7])
@pytest.mark.parametrize("make", [ball, chain, heavy_band, mixed])
@pytest.mark.parametrize("limits", [(1024, 2048), (8, 4)], ids=["as shipped", "long runs in the small"])
def test_groups_are_those_of_comparing_every_two(
    make: Callable[[int, np.random.Generator], Hashes],
    bits: int,
    limits: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With short limits a few hundred hashes take the ways that millions take."""
    monkeypatch.setattr(grouping, "LONG_RUN", limits[0])
    monkeypatch.setattr(grouping, "FEW_HASHES", limits[1])
    for seed in range(2):
        random = np.random.default_rng(seed)
        hashes = make(120, random)
        colors = random.choice(np.array([100, 104, 112, 130], np.uint8), (len(hashes), 1)) + np.zeros((1, 48), np.uint8)
        forest = near_forest(hashes, colors, distance_bits=bits, color_distance=8.0)
        assert forest.groups_N.tolist() == brute_groups(hashes, colors, bits, 8.0)


def test_the_forest_holds_near_pairs_and_connects_each_group() -> None:
    random = np.random.default_rng(5)
    hashes = mixed(2000, random)
    forest = near_forest(hashes, gray(2000), distance_bits=4, color_distance=8.0)
    assert (np.bitwise_count(hashes[forest.a_E] ^ hashes[forest.b_E]) <= 4).all()
    assert len(forest.a_E) == 2000 - len(set(forest.groups_N.tolist())), "no edge too many"
    assert (forest.groups_N[forest.a_E] == forest.groups_N[forest.b_E]).all()
    again = near_forest(hashes, gray(2000), distance_bits=4, color_distance=8.0)
    assert np.array_equal(forest.a_E, again.a_E) and np.array_equal(forest.b_E, again.b_E)


def test_none_and_one_image_are_no_pairs() -> None:
    for count in (0, 1):
        forest = near_forest(np.zeros(count, np.uint64), gray(count), distance_bits=4, color_distance=8.0)
        assert (forest.groups_N.tolist(), len(forest.a_E)) == (list(range(count)), 0)


@pytest.mark.parametrize(
    ("make", "most_compared"),
    [
        # every two of 20,000 are 200 million
        (lambda n, r: r.integers(0, 2**64, n, dtype=np.uint64), 1_000_000),
        (lambda n, r: np.full(n, 7, np.uint64), 500_000),
        (ball, 5_000_000),
        (chain, 1_000_000),
        (heavy_band, 25_000_000),
    ],
    ids=["random", "identical", "ball", "chain", "heavy band"],
)
def test_clustered_hashes_are_not_compared_every_two(
    make: Callable[[int, np.random.Generator], Hashes], most_compared: int
) -> None:
    hashes = make(20_000, np.random.default_rng(1))
    forest = near_forest(hashes, gray(len(hashes)), distance_bits=4, color_distance=8.0)
    assert forest.num_compared <= most_compared


def test_memory_is_linear_however_many_pairs_there_are() -> None:
    """20,000 hashes in one ball are some 30 million near pairs."""
    hashes = ball(20_000, np.random.default_rng(2))
    near_forest(hashes[:10], gray(10), distance_bits=4, color_distance=8.0)  # scipy's import
    tracemalloc.start()
    try:
        forest = near_forest(hashes, gray(20_000), distance_bits=4, color_distance=8.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(set(forest.groups_N.tolist())) == 1
    assert peak < 60 * 2**20
