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
    return hashlib.sha256(f"{image.phash_64} {image.color_48}".encode()).hexdigest()[:16]


def find_pairs(images: Iterable[ImageMeasurement], *, distance_bits: int, color_distance: float) -> list[Pair]:
    """All pairs of different looks that are near-duplicates, sorted.

    Args:
        images: Measured images without a defect.
        distance_bits: Largest Hamming distance of the perceptual hashes.
        color_distance: Largest mean absolute difference of the 4x4 RGB thumbnails, 0..255.
    """
    looks = {look_of(image): image for image in images}
    names = sorted(looks)
    if len(names) < 2:
        return []
    hashes = pa.table(
        {
            "i": pa.array(range(len(names)), pa.int32()),
            "phash": pa.array([looks[name].phash_64 for name in names], pa.uint64()),
        }
    )
    with duckdb.connect() as connection:
        connection.register("hashes", hashes)
        found = connection.sql(_candidates_sql(distance_bits)).to_arrow_table()
    left, right = found["i"].to_numpy(), found["j"].to_numpy()
    colors = np.array([list(bytes.fromhex(looks[name].color_48 or "")) for name in names], dtype=np.int16)
    differences = np.abs(colors[left] - colors[right]).mean(axis=1) if len(left) else np.zeros(0)
    pairs = [
        Pair(names[i], names[j], int(distance), round(float(difference), 3))
        for i, j, distance, difference in zip(left, right, found["distance"].to_pylist(), differences, strict=True)
        if difference <= color_distance
    ]
    return sorted(pairs, key=lambda pair: (pair.a, pair.b))


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
