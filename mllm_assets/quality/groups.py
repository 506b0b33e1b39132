"""The groups of samples that look the same, as arrays: which sample is like which, and the name of each group."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mllm_assets.data.raw_files import ImageIndex
from mllm_assets.data.spec import QualitySpec
from mllm_assets.quality.duplicates import NearPairs, look_name, near_pairs
from mllm_assets.quality.files import IMAGES_FILE
from mllm_assets.quality.measure import Images

LOOK_PAIR_SCHEMA = pa.schema(
    [("a", pa.string()), ("b", pa.string()), ("distance_bits", pa.int64()), ("color_distance", pa.float64())]
)


@dataclass(frozen=True, slots=True)
class SamplePair:
    """Two samples by their place in the source, the images by which they are alike, and how far these differ."""

    samples: tuple[int, int]
    images: tuple[int, int]
    distance_bits: int
    color_distance: float


@dataclass(frozen=True, slots=True)
class SampleGroups:
    """Groups of some of S samples.

    Attributes:
        groups_S: The group of each sample, -1 of one that was left out.
        keys_G: Each group's name: the first 16 hex digits of its smallest image digest. Texts may change, it stays.
        sizes_G: Samples in each group.
    """

    groups_S: NDArray[np.int64]
    keys_G: NDArray[np.bytes_]
    sizes_G: NDArray[np.int64]

    @property
    def num_duplicates(self) -> int:
        return int(self.sizes_G.sum() - len(self.sizes_G))

    def key(self, sample: int) -> str | None:
        group = self.groups_S[sample]
        return None if group < 0 else bytes(self.keys_G[group]).decode()

    def size(self, sample: int) -> int:
        group = self.groups_S[sample]
        return 0 if group < 0 else int(self.sizes_G[group])


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What looks the same.

    Attributes:
        groups: Of the accepted samples.
        look_pairs: Near-duplicate looks by name, as many as connect the groups.
        sample_pairs: For people: each look's first sample with its others, and with those of near looks.
    """

    groups: SampleGroups
    look_pairs: pa.Table
    sample_pairs: list[SamplePair]


@dataclass(frozen=True, slots=True)
class Looks:
    """What U images look like, in the order of `ImageIndex.ids`; zeros where one could not be measured."""

    phash_U: NDArray[np.uint64]
    colors_UC: NDArray[np.uint8]


def read_looks(quality: Path) -> Looks:
    """What the images of a finished assessment look like."""
    phash, colors = [np.zeros(0, np.uint64)], [np.zeros((0, 48), np.uint8)]
    with pq.ParquetFile(quality / IMAGES_FILE, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=4096, columns=["phash_64", "color_48"]):
            phash.append(batch["phash_64"].fill_null(0).to_numpy())
            text = "".join(batch["color_48"].fill_null("00" * 48).to_pylist())
            colors.append(np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 48))
    return Looks(np.concatenate(phash), np.concatenate(colors))


def group_samples(index: ImageIndex, looks: Looks, chosen_S: NDArray[np.bool_], limits: QualitySpec) -> SampleGroups:
    """Connect chosen samples that share an image or hold near-duplicates; the others connect nothing."""
    return _Uses(index, looks, chosen_S, limits).groups()


def find_duplicates(
    index: ImageIndex, images: Looks | Images, accepted_S: NDArray[np.bool_], limits: QualitySpec
) -> Duplicates:
    """The groups of the accepted samples, and the pairs that make them."""
    uses = _Uses(index, images, accepted_S, limits)
    return Duplicates(uses.groups(), uses.look_pairs(), uses.sample_pairs())


class _Uses:
    """The images that chosen samples use, and what they look like."""

    def __init__(
        self, index: ImageIndex, images: Looks | Images, chosen_S: NDArray[np.bool_], limits: QualitySpec
    ) -> None:
        phash_U, colors_UC = images.phash_U, images.colors_UC
        self._index, self._chosen, self._phash, self._colors = index, chosen_S, phash_U, colors_UC
        samples_T = np.repeat(np.arange(index.num_samples), np.diff(index.offsets_S1))
        used = chosen_S[samples_T]
        self._samples, self._images = samples_T[used], index.uses_T[used]
        # a use's look: equal hash and colours; numbered in order of first use
        self._looks, self._first, self._look_of_use = _looks(phash_U, colors_UC, self._images)
        self._near = near_pairs(
            phash_U[self._looks],
            colors_UC[self._looks],
            distance_bits=limits.duplicate_distance_bits,
            color_distance=limits.duplicate_color_distance,
        )

    def groups(self) -> SampleGroups:
        groups_S, num_groups = _components(self._chosen, self._samples, self._look_of_use, self._near)
        return SampleGroups(
            groups_S=groups_S,
            keys_G=_keys(self._index, groups_S, num_groups, self._samples, self._images),
            sizes_G=np.bincount(groups_S[self._chosen], minlength=num_groups),
        )

    def look_pairs(self) -> pa.Table:
        return _look_pairs(self._phash, self._colors, self._looks, self._near)

    def sample_pairs(self) -> list[SamplePair]:
        return _sample_pairs(self._samples, self._images, self._look_of_use, self._first, self._near)


def _looks(
    phash_U: NDArray[np.uint64], colors_UC: NDArray[np.uint8], uses: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """An image of each look, the use where it comes first, and the look of each use."""
    if not len(uses):
        none = np.zeros(0, np.int64)
        return none, none, none
    content = np.concatenate([phash_U[:, None].view(np.uint8), colors_UC], axis=1)
    names = np.ascontiguousarray(content).view(f"V{content.shape[1]}").ravel()
    _, look_of_image = np.unique(names, return_inverse=True)
    found, first, inverse = np.unique(look_of_image[uses], return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(found), np.int64)
    rank[order] = np.arange(len(found))
    return uses[first[order]].astype(np.int64), first[order], rank[inverse]


def _components(
    accepted_S: NDArray[np.bool_], samples: NDArray[np.int64], look_of_use: NDArray[np.int64], near: NearPairs
) -> tuple[NDArray[np.int64], int]:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num_samples, num_looks = len(accepted_S), int(look_of_use.max(initial=-1)) + 1
    ends = np.concatenate([samples, num_samples + near.a_E]), np.concatenate([look_of_use, near.b_E]) + num_samples
    size = num_samples + num_looks
    graph = coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    _, numbers = np.unique(labels[:num_samples][accepted_S], return_inverse=True)
    groups = np.full(num_samples, -1, np.int64)
    groups[accepted_S] = numbers
    return groups, int(numbers.max(initial=-1)) + 1


def _keys(
    index: ImageIndex, groups_S: NDArray[np.int64], num_groups: int, samples: NDArray[np.int64], uses: NDArray[np.int32]
) -> NDArray[np.bytes_]:
    names = index.ids.to_numpy(zero_copy_only=False).astype("S64") if len(index.ids) else np.zeros(0, "S64")
    order = np.argsort(names)
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names))
    smallest = np.full(num_groups, len(names), np.int64)
    np.minimum.at(smallest, groups_S[samples], rank[uses])
    return names[order[smallest]].astype("S16")


def _look_pairs(
    phash_U: NDArray[np.uint64], colors_UC: NDArray[np.uint8], looks: NDArray[np.int64], near: NearPairs
) -> pa.Table:
    rows = []
    for a, b, bits, color in zip(near.a_E, near.b_E, near.bits_E.tolist(), near.color_E.tolist(), strict=True):
        names = sorted(look_name(int(phash_U[i]), colors_UC[i].tobytes().hex()) for i in looks[[a, b]])
        rows.append({"a": names[0], "b": names[1], "distance_bits": bits, "color_distance": color})
    rows.sort(key=lambda row: (row["a"], row["b"]))
    return pa.Table.from_pylist(rows, schema=LOOK_PAIR_SCHEMA)


def _sample_pairs(
    samples: NDArray[np.int64],
    uses: NDArray[np.int32],
    look_of_use: NDArray[np.int64],
    first_use: NDArray[np.int64],
    near: NearPairs,
) -> list[SamplePair]:
    def pair(one: int, other: int, bits: int, color: float) -> SamplePair:
        return SamplePair((int(samples[one]), int(samples[other])), (int(uses[one]), int(uses[other])), bits, color)

    again = np.ones(len(look_of_use), bool)
    again[first_use] = False
    pairs = [pair(int(first_use[look_of_use[use]]), use, 0, 0.0) for use in np.flatnonzero(again).tolist()]
    columns = (first_use[near.a_E].tolist(), first_use[near.b_E].tolist(), near.bits_E.tolist(), near.color_E.tolist())
    pairs += [pair(*row) for row in zip(*columns, strict=True)]
    return [pair for pair in pairs if pair.samples[0] != pair.samples[1]]
