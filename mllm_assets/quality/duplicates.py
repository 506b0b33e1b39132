"""Exact and near-duplicate images, and the groups of samples that must stay on one side of a split.

Two images are near-duplicates when their 64-bit perceptual hashes differ in at most d bits and the means of a 4x4
RGB thumbnail differ little (the hash alone is colour-blind: it takes a blue heart for a brown one). Candidates come
from banding: of d+1 bands of the hash two within d bits must share one, so the search is exact.
Not covered: crops, rotations and mirror images.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

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
    """All pairs of different looks that are near-duplicates, sorted.

    Args:
        images: Measured images without a defect.
        distance_bits: Largest Hamming distance of the perceptual hashes.
        color_distance: Largest mean absolute difference of the 4x4 RGB thumbnails, 0..255.
    """
    looks = {look_of(image): image for image in images}
    names = sorted(looks)
    hashes = np.array([looks[name].phash_64 for name in names], np.uint64)
    colors = np.array([list(bytes.fromhex(looks[name].color_48 or "")) for name in names], np.uint8)
    near = near_pairs(hashes, colors, distance_bits=distance_bits, color_distance=color_distance)
    columns = (near.a_E.tolist(), near.b_E.tolist(), near.bits_E.tolist(), near.color_E.tolist())
    return [Pair(names[a], names[b], bits, color) for a, b, bits, color in zip(*columns, strict=True)]


@dataclass(frozen=True, slots=True)
class NearPairs:
    """E pairs by their places in the input, `a_E` < `b_E`, sorted; Hamming distances and mean colour differences."""

    a_E: NDArray[np.int64]
    b_E: NDArray[np.int64]
    bits_E: NDArray[np.int64]
    color_E: NDArray[np.float64]


def near_pairs(
    hashes_N: NDArray[np.uint64], colors_NC: NDArray[np.uint8], *, distance_bits: int, color_distance: float
) -> NearPairs:
    """All pairs of N looks that are near-duplicates. The looks must differ, or there may be N² of them."""
    if len(hashes_N) < 2:
        none = np.zeros(0, np.int64)
        return NearPairs(none, none, none, np.zeros(0))
    hashes = pa.table({"i": pa.array(np.arange(len(hashes_N), dtype=np.int32)), "phash": pa.array(hashes_N)})
    with duckdb.connect() as connection:
        connection.register("hashes", hashes)
        found = (
            connection.sql(_candidates_sql(distance_bits))
            .to_arrow_table()
            .sort_by([("i", "ascending"), ("j", "ascending")])
        )
    a, b = (found[name].to_numpy().astype(np.int64) for name in ("i", "j"))
    bits = found["distance"].to_numpy().astype(np.int64)
    differences = np.abs(colors_NC[a].astype(np.int16) - colors_NC[b]).mean(axis=1) if len(a) else np.zeros(0)
    near = differences <= color_distance
    return NearPairs(a[near], b[near], bits[near], differences[near].round(3))


def _candidates_sql(distance_bits: int) -> str:
    edges = [int(edge) for edge in np.linspace(0, 64, distance_bits + 2)]
    bands = " UNION ALL ".join(
        f"SELECT i, phash, {band} AS band, (phash >> {start}) & {(1 << (end - start)) - 1}::UBIGINT AS bits FROM hashes"
        for band, (start, end) in enumerate(pairwise(edges))
    )
    return f"""
        WITH bands AS ({bands})
        SELECT DISTINCT a.i, b.i AS j, bit_count(xor(a.phash, b.phash)) AS distance
        FROM bands a JOIN bands b ON a.band = b.band AND a.bits = b.bits AND a.i < b.i
        WHERE bit_count(xor(a.phash, b.phash)) <= {distance_bits}
    """


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
