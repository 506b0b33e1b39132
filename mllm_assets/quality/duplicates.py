"""Exact and near-duplicate images.

Two images are near-duplicates when their 64-bit perceptual hashes differ in at most d bits and the means of a 4x4
RGB thumbnail differ little (the hash alone is colour-blind: it takes a blue heart for a brown one). `grouping` finds
them exactly.
Not covered: crops, rotations and mirror images.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mllm_assets.quality.grouping import near_forest
from mllm_assets.quality.probes import ImageMeasurement


def look_of(image: ImageMeasurement) -> str:
    """16 hex digits of what an image looks like (hash and colours); byte-wise copies share it."""
    return look_name(image.phash_64, image.color_48)


def look_name(phash_64: int | None, color_48: str | None) -> str:
    """See `look_of`."""
    return hashlib.sha256(f"{phash_64} {color_48}".encode()).hexdigest()[:16]


def pairs_across(
    looks: Mapping[str, tuple[int, str]],
    train: Collection[str],
    val: Collection[str],
    *,
    distance_bits: int,
    color_distance: float,
) -> list[tuple[str, str, int]]:
    """Every near pair of different looks, one of `train` and one of `val`, with its Hamming distance.

    Unlike `near_pairs`, which gives as many as connect each group; only groups on both sides are looked at pairwise.
    """
    names, hashes, colors = _arrays(looks)
    limits = {"distance_bits": distance_bits, "color_distance": color_distance}
    groups = near_forest(hashes, colors, **limits).groups_N
    trained = np.array([name in train for name in names], bool)
    held = np.array([name in val for name in names], bool)
    on_both = np.intersect1d(groups[trained], groups[held])
    trained &= np.isin(groups, on_both)
    found = []
    for look in np.flatnonzero(held & np.isin(groups, on_both)).tolist():
        others = np.flatnonzero(trained & (groups == groups[look]))
        others = others[others != look]
        bits = np.bitwise_count(hashes[others] ^ hashes[look])
        colour = np.abs(colors[others].astype(np.int16) - colors[look]).mean(axis=1)
        near = (bits <= distance_bits) & (colour <= color_distance)
        found += [(names[n], names[look], b) for n, b in zip(others[near].tolist(), bits[near].tolist(), strict=True)]
    return found


def _arrays(looks: Mapping[str, tuple[int, str]]) -> tuple[list[str], NDArray[np.uint64], NDArray[np.uint8]]:
    names = sorted(looks)
    hashes = np.array([looks[name][0] for name in names], np.uint64)
    colors = np.frombuffer(bytes.fromhex("".join(looks[name][1] for name in names)), np.uint8)
    return names, hashes, colors.reshape(len(names), -1) if names else np.zeros((0, 1), np.uint8)


@dataclass(frozen=True, slots=True)
class NearPairs:
    """E pairs by their places in the input, `a_E` < `b_E`, sorted; Hamming distances and mean colour differences.

    They connect the looks that were given. A part of the looks has to be connected anew: what connects them may lie
    outside of it.
    """

    a_E: NDArray[np.int64]
    b_E: NDArray[np.int64]
    bits_E: NDArray[np.int64]
    color_E: NDArray[np.float64]


def near_pairs(
    hashes_N: NDArray[np.uint64], colors_NC: NDArray[np.uint8], *, distance_bits: int, color_distance: float
) -> NearPairs:
    """Near-duplicate pairs of N looks, as many as connect each group and no more; see `grouping.near_forest`."""
    forest = near_forest(hashes_N, colors_NC, distance_bits=distance_bits, color_distance=color_distance)
    a, b = forest.a_E, forest.b_E
    bits = np.bitwise_count(hashes_N[a] ^ hashes_N[b]).astype(np.int64)
    differences = np.abs(colors_NC[a].astype(np.int16) - colors_NC[b]).mean(axis=1) if len(a) else np.zeros(0)
    return NearPairs(a, b, bits, differences.round(3))
