"""Groups of samples that look the same, as arrays: each sample's group, and each group's name."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mllm_assets.data.ingest.raw_files import ImageIndex
from mllm_assets.data.ingest.spec import QualitySpec
from mllm_assets.data.quality.grouping import differences, near_forest
from mllm_assets.data.quality.measure import Images
from mllm_assets.data.quality.probes import look_name

LOOK_PAIR_SCHEMA = pa.schema(
    [("a", pa.string()), ("b", pa.string()), ("distance_bits", pa.int64()), ("color_distance", pa.float64())]
)
QUALITY_FILE = "quality.parquet"  # a row per sample, in the order of the source
IMAGES_FILE = "images.parquet"  # a row per distinct image, in the order of first use
PAIRS_FILE = "pairs.parquet"  # near-duplicate looks, which connect the groups
DUPLICATES_FILE = "duplicates.parquet"  # pairs of samples and their images, to read


@dataclass(frozen=True, slots=True)
class SamplePair:
    """Two samples by their index in the source, the images that they share, and how far these differ."""

    samples: tuple[int, int]
    images: tuple[int, int]
    distance_bits: int
    color_distance: float


@dataclass(frozen=True, slots=True)
class SampleGroups:
    """Groups of some of S samples.

    Attributes:
        groups_S: The group of each sample, -1 if it was left out.
        keys_G: Each group's name: the first 16 hex digits of its smallest image digest, whatever the texts.
        sizes_G: Samples in each group.
    """

    groups_S: NDArray[np.int64]
    keys_G: NDArray[np.bytes_]
    sizes_G: NDArray[np.int64]

    @property
    def num_duplicates(self) -> int:
        return int(self.sizes_G.sum() - len(self.sizes_G))

    def keys(self, first: int, last: int) -> list[str | None]:
        """The names of the groups of samples first to last - 1, None of those that were left out."""
        groups = self.groups_S[first:last]
        names = np.append(self.keys_G, b"")[groups].tolist()  # group -1 is the one that was appended
        return [name.decode() or None for name in names]

    def sizes(self, first: int, last: int) -> NDArray[np.int64]:
        """The sizes of the same groups, 0 of those that were left out."""
        return np.append(self.sizes_G, 0)[self.groups_S[first:last]]


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What looks the same.

    Attributes:
        groups: Of the accepted samples.
        look_pairs: Near-duplicate looks by name, as many as connect the groups.
        sample_pairs: To read: each look's first sample with its others, and with those of near looks.
    """

    groups: SampleGroups
    look_pairs: pa.Table
    sample_pairs: list[SamplePair]


@dataclass(frozen=True, slots=True)
class PerceptualHashes:
    """What U images look like, in the order of `ImageIndex.ids`; zeros where one could not be measured."""

    phash_U: NDArray[np.uint64]
    colors_UC: NDArray[np.uint8]


def read_perceptual_hashes(quality: Path) -> PerceptualHashes:
    """What the images of a finished assessment look like."""
    phash, colors = [np.zeros(0, np.uint64)], [np.zeros((0, 48), np.uint8)]
    with pq.ParquetFile(quality / IMAGES_FILE, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=4096, columns=["phash_64", "color_48"]):
            phash.append(batch["phash_64"].fill_null(0).to_numpy())
            text = "".join(batch["color_48"].fill_null("00" * 48).to_pylist())
            colors.append(np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 48))
    return PerceptualHashes(np.concatenate(phash), np.concatenate(colors))


def group_samples(
    index: ImageIndex, hashes: PerceptualHashes, chosen_S: NDArray[np.bool_], limits: QualitySpec
) -> SampleGroups:
    """Connect chosen samples that share an image or hold near-duplicates; the others connect nothing."""
    return _Uses(index, hashes, chosen_S, limits).groups()


def find_duplicates(
    index: ImageIndex, images: PerceptualHashes | Images, accepted_S: NDArray[np.bool_], limits: QualitySpec
) -> Duplicates:
    """The groups of the accepted samples, and the pairs that make them."""
    uses = _Uses(index, images, accepted_S, limits)
    return Duplicates(uses.groups(), uses.look_pairs(), uses.sample_pairs())


class _Uses:
    """The images that chosen samples use, and what they look like."""

    def __init__(
        self, index: ImageIndex, images: PerceptualHashes | Images, chosen_S: NDArray[np.bool_], limits: QualitySpec
    ) -> None:
        phash_U, colors_UC = images.phash_U, images.colors_UC
        self._index, self._chosen, self._phash, self._colors = index, chosen_S, phash_U, colors_UC
        samples_T = np.repeat(np.arange(index.num_samples), np.diff(index.offsets_S1))
        used = chosen_S[samples_T]
        self._samples, self._images = samples_T[used], index.uses_T[used]
        # a use's look: equal hash and colours; numbered in order of first use
        self._looks, self._first, self._look_of_use = _looks(phash_U, colors_UC, self._images)
        self._near = near_forest(
            phash_U[self._looks],
            colors_UC[self._looks],
            distance_bits=limits.duplicate_distance_bits,
            color_distance=limits.duplicate_color_distance,
        )

    def _near_pairs(self) -> Iterator[tuple[int, int, int, float]]:
        """The near pairs of looks, with their Hamming distances and mean colour differences."""
        a, b = self._looks[self._near.a_E], self._looks[self._near.b_E]
        bits, colors = differences(self._phash[a], self._colors[a], self._phash[b], self._colors[b])
        columns = (self._near.a_E, self._near.b_E, bits, colors.round(3))
        return zip(*(column.tolist() for column in columns), strict=True)

    def groups(self) -> SampleGroups:
        groups_S, num_groups = self._components()
        sizes_G = np.bincount(groups_S[self._chosen], minlength=num_groups)
        return SampleGroups(groups_S=groups_S, keys_G=self._keys(groups_S, num_groups), sizes_G=sizes_G)

    def _components(self) -> tuple[NDArray[np.int64], int]:
        """The group of each sample, and their number."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        num_samples, near = len(self._chosen), self._near
        ends = (
            np.concatenate([self._samples, num_samples + near.a_E]),
            np.concatenate([self._look_of_use, near.b_E]) + num_samples,
        )
        size = num_samples + len(self._looks)
        graph = coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(size, size))
        _, labels = connected_components(graph, directed=False)
        _, numbers = np.unique(labels[:num_samples][self._chosen], return_inverse=True)
        groups_S = np.full(num_samples, -1, np.int64)
        groups_S[self._chosen] = numbers
        return groups_S, int(numbers.max(initial=-1)) + 1

    def _keys(self, groups_S: NDArray[np.int64], num_groups: int) -> NDArray[np.bytes_]:
        ids = self._index.ids
        names = ids.to_numpy(zero_copy_only=False).astype("S64") if len(ids) else np.zeros(0, "S64")
        order = np.argsort(names)
        rank = np.empty(len(names), np.int64)
        rank[order] = np.arange(len(names))
        smallest = np.full(num_groups, len(names), np.int64)
        np.minimum.at(smallest, groups_S[self._samples], rank[self._images])
        keys = np.append(names.astype("S16"), b"")[np.append(order, len(names))[smallest]]
        for sample, name in self._index.text_only.items():  # a group of its own
            if self._chosen[sample]:
                keys[groups_S[sample]] = name.encode()
        return keys

    def look_pairs(self) -> pa.Table:
        rows = []
        for a, b, bits, color in self._near_pairs():
            images = self._looks[[a, b]]
            names = sorted(look_name(int(self._phash[i]), self._colors[i].tobytes().hex()) for i in images)
            rows.append({"a": names[0], "b": names[1], "distance_bits": bits, "color_distance": color})
        rows.sort(key=lambda row: (row["a"], row["b"]))
        return pa.Table.from_pylist(rows, schema=LOOK_PAIR_SCHEMA)

    def sample_pairs(self) -> list[SamplePair]:
        samples, images, first = self._samples, self._images, self._first

        def pair(one: int, other: int, bits: int, color: float) -> SamplePair:
            ends = (int(samples[one]), int(samples[other])), (int(images[one]), int(images[other]))
            return SamplePair(*ends, bits, color)

        is_repeat = np.ones(len(samples), bool)
        is_repeat[first] = False
        pairs = [pair(int(first[self._look_of_use[use]]), use, 0, 0.0) for use in np.flatnonzero(is_repeat).tolist()]
        pairs += [pair(int(first[a]), int(first[b]), bits, color) for a, b, bits, color in self._near_pairs()]
        return [pair for pair in pairs if pair.samples[0] != pair.samples[1]]


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
