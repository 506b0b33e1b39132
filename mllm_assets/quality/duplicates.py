"""Exact and near-duplicate images.

Two images are near-duplicates when their 64-bit perceptual hashes differ in at most d bits and the means of a 4x4
RGB thumbnail differ little (the hash alone is colour-blind: it takes a blue heart for a brown one). `grouping` finds
them exactly.
Not covered: crops, rotations and mirror images.
"""

import hashlib
from collections.abc import Iterator
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
    hashes_N: NDArray[np.uint64],
    colors_NC: NDArray[np.uint8],
    train_N: NDArray[np.bool_],
    val_N: NDArray[np.bool_],
    *,
    distance_bits: int,
    color_distance: float,
) -> Iterator[tuple[int, int, int]]:
    """Near pairs of N images, one of train and one of val, with their Hamming distance: an image may be both.

    Every validation image is paired with the first image of each look in training that is near it. Unlike
    `near_pairs`, which gives as many as connect each group; only groups on both sides are looked at pairwise.
    """
    limits = {"distance_bits": distance_bits, "color_distance": color_distance}
    groups = near_forest(hashes_N, colors_NC, **limits).groups_N
    on_both = np.intersect1d(groups[train_N], groups[val_N])
    trained = np.flatnonzero(train_N & np.isin(groups, on_both))
    looks = np.concatenate([hashes_N[trained, None].view(np.uint8), colors_NC[trained]], axis=1)
    trained = trained[np.sort(np.unique(looks, axis=0, return_index=True)[1])]
    for image in np.flatnonzero(val_N & np.isin(groups, on_both)).tolist():
        others = trained[groups[trained] == groups[image]]
        bits = np.bitwise_count(hashes_N[others] ^ hashes_N[image])
        colour = np.abs(colors_NC[others].astype(np.int16) - colors_NC[image]).mean(axis=1)
        near = (bits <= distance_bits) & (colour <= color_distance)
        yield from ((a, image, b) for a, b in zip(others[near].tolist(), bits[near].tolist(), strict=True))


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
