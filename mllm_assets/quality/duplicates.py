"""Exact and near-duplicate images, and the groups of samples that must stay on one side of a split.

Two images are near-duplicates when their 64-bit perceptual hashes differ in at most d bits and the means of a 4x4
RGB thumbnail differ little (the hash alone is colour-blind: it takes a blue heart for a brown one). `grouping` finds
them exactly.
Not covered: crops, rotations and mirror images.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mllm_assets.quality.grouping import near_forest
from mllm_assets.quality.probes import ImageMeasurement


@dataclass(frozen=True, slots=True)
class Pair:
    """Two looks that count as the same picture; `a` < `b`."""

    a: str
    b: str
    distance_bits: int
    color_distance: float


def look_of(image: ImageMeasurement) -> str:
    """16 hex digits of what an image looks like (hash and colours); byte-wise copies share it."""
    return look_name(image.phash_64, image.color_48)


def look_name(phash_64: int | None, color_48: str | None) -> str:
    """See `look_of`."""
    return hashlib.sha256(f"{phash_64} {color_48}".encode()).hexdigest()[:16]


def find_pairs(images: Iterable[ImageMeasurement], *, distance_bits: int, color_distance: float) -> list[Pair]:
    """Near-duplicate pairs of different looks that connect each group of them, sorted.

    Args:
        images: Measured images without a defect.
        distance_bits: Largest Hamming distance of the perceptual hashes.
        color_distance: Largest mean absolute difference of the 4x4 RGB thumbnails, 0..255.
    """
    looks = {look_of(image): (image.phash_64 or 0, image.color_48 or "") for image in images}
    return pairs_of_looks(looks, distance_bits=distance_bits, color_distance=color_distance)


def pairs_of_looks(looks: Mapping[str, tuple[int, str]], *, distance_bits: int, color_distance: float) -> list[Pair]:
    """`find_pairs` of looks by name, each a hash and colours as `ImageMeasurement` holds them."""
    names, hashes, colors = _arrays(looks)
    near = near_pairs(hashes, colors, distance_bits=distance_bits, color_distance=color_distance)
    columns = (near.a_E.tolist(), near.b_E.tolist(), near.bits_E.tolist(), near.color_E.tolist())
    return [Pair(names[a], names[b], bits, color) for a, b, bits, color in zip(*columns, strict=True)]


def pairs_across(
    looks: Mapping[str, tuple[int, str]],
    train: Collection[str],
    val: Collection[str],
    *,
    distance_bits: int,
    color_distance: float,
) -> list[tuple[str, str, int]]:
    """Every near pair of different looks, one of `train` and one of `val`, with its Hamming distance.

    Unlike `find_pairs`, which gives as many as connect each group; only groups on both sides are looked at pairwise.
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


def group_samples(looks: Mapping[str, Sequence[str]], pairs: Iterable[Pair]) -> dict[str, int]:
    """Number the connected components of samples that share a look or hold near-duplicates.

    Args:
        looks: The looks of each sample's images. Looks of other samples do not connect anything.
        pairs: From `find_pairs`.

    Returns:
        A component number for each sample; equal numbers belong together.
    """
    parents: dict[str, str] = {}

    def find(node: str) -> str:
        parents.setdefault(node, node)
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    for sample_id, sample_looks in looks.items():
        for look in sample_looks:
            parents[find(f"look {look}")] = find(f"sample {sample_id}")
    for pair in pairs:
        if f"look {pair.a}" in parents and f"look {pair.b}" in parents:
            parents[find(f"look {pair.a}")] = find(f"look {pair.b}")
    numbers: dict[str, int] = {}
    return {sample_id: numbers.setdefault(find(f"sample {sample_id}"), len(numbers)) for sample_id in looks}


def group_keys(groups: Mapping[str, int], images: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Name each sample's group by its smallest image digest (16 hex): texts may change, the name stays."""
    smallest: dict[int, str] = {}
    for sample_id, group in groups.items():
        name = min(images[sample_id])[:16]
        smallest[group] = min(smallest.get(group, name), name)
    return {sample_id: smallest[group] for sample_id, group in groups.items()}
