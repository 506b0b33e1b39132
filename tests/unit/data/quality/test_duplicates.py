"""Near-duplicates: every pair within the distance, none that only shares a shape."""

import random
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from PIL import ImageEnhance
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mllm_assets.data.ingest.raw_files import ImageIndex
from mllm_assets.data.ingest.spec import QualitySpec
from mllm_assets.data.quality.grouping import near_forest
from mllm_assets.data.quality.groups import PerceptualHashes, SampleGroups, find_duplicates, group_samples
from mllm_assets.data.quality.probes import ImageMeasurement
from tests.unit.data.quality.made_images import encode, measure, picture


def pairs_of(images: Sequence[ImageMeasurement], distance_bits: int, color_distance: float) -> list[tuple[int, int]]:
    hashes = np.array([image.phash_64 for image in images], np.uint64)
    colors = np.array([list(bytes.fromhex(image.color_48 or "")) for image in images], np.uint8)
    near = near_forest(hashes, colors, distance_bits=distance_bits, color_distance=color_distance)
    return list(zip(near.a_E.tolist(), near.b_E.tolist(), strict=True))


def measured(phash: int, color: int = 0) -> ImageMeasurement:
    return ImageMeasurement(image_sha256=f"{phash:x}", num_bytes=1, phash_64=phash, color_48=bytes([color] * 48).hex())


def components(num_looks: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    ends = np.array(pairs, int).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(num_looks, num_looks))
    return connected_components(graph, directed=False)[1].tolist()


def made_index(samples: Sequence[Sequence[int]], digests: Sequence[str]) -> ImageIndex:
    """Samples that use images by number."""
    offsets = np.cumsum([0, *(len(images) for images in samples)])
    uses = np.array([image for images in samples for image in images], np.int32)
    return ImageIndex(pa.array(digests), uses, offsets, [0, len(samples)], [0, len(digests)])


def grouped(samples: Sequence[Sequence[int]], phashes: Sequence[int], digests: Sequence[str]) -> SampleGroups:
    hashes = PerceptualHashes(np.array(phashes, np.uint64), np.zeros((len(phashes), 48), np.uint8))
    chosen = np.ones(len(samples), bool)
    return group_samples(made_index(samples, digests), hashes, chosen, QualitySpec(duplicate_distance_bits=4))


def test_the_pairs_are_near_and_connect_what_comparing_all_connects() -> None:
    chooser = random.Random(3)
    hashes = [chooser.getrandbits(64) for _ in range(60)]
    for original in list(hashes):
        flipped = original
        for bit in chooser.sample(range(64), chooser.randint(1, 8)):
            flipped ^= 1 << bit
        hashes.append(flipped)
    for distance in (0, 1, 4, 7):
        found = pairs_of([measured(phash) for phash in hashes], distance, 255)
        everything = [
            (a, b)
            for a in range(len(hashes))
            for b in range(a + 1, len(hashes))
            if (hashes[a] ^ hashes[b]).bit_count() <= distance
        ]
        assert set(found) <= set(everything)
        assert components(len(hashes), found) == components(len(hashes), everything)


def test_the_same_shape_in_another_colour_is_another_picture() -> None:
    """A perceptual hash takes a blue heart for a brown one."""
    images = [measured(5, color=10), measured(5, color=200)]
    assert pairs_of(images, 4, 8.0) == []
    assert pairs_of(images, 4, 255.0) == [(0, 1)]


def test_resized_and_recompressed_copies_are_found_and_other_pictures_are_not() -> None:
    originals = [measure(encode(picture(n, 128))) for n in range(40)]
    copies = [measure(encode(picture(n, 128).resize((64, 64)), "JPEG", quality=50)) for n in range(40)]
    copies += [measure(encode(ImageEnhance.Brightness(picture(n, 128)).enhance(0.98))) for n in range(40)]
    pairs = pairs_of([*originals, *copies], 4, 8.0)
    assert {a % 40 for a, b in pairs if a % 40 == b % 40} >= set(range(38))
    assert [(a, b) for a, b in pairs if a % 40 != b % 40] == []


def test_a_thousand_images_of_one_look_make_a_row_each_not_one_for_every_two() -> None:
    """Pairing every two of them would be half a million rows."""
    index = made_index([[n] for n in range(1000)], [f"{n:064x}" for n in range(1000)])
    hashes = PerceptualHashes(np.zeros(1000, np.uint64), np.zeros((1000, 48), np.uint8))
    found = find_duplicates(index, hashes, np.ones(1000, bool), QualitySpec())
    assert (len(found.look_pairs), len(found.sample_pairs), found.groups.num_duplicates) == (0, 999, 999)


def test_groups_are_chains_of_shared_and_near_looks() -> None:
    one, two, three, four, five = 0xFF << 8, 0xFF << 24, (0xFF << 24) ^ 3, 0xFF << 40, 0xFF << 56
    digests = [f"{n}" * 64 for n in range(1, 6)]
    groups = grouped([[0], [0, 1], [2], [3], [4]], [one, two, three, four, five], digests).groups_S.tolist()
    assert groups[0] == groups[1] == groups[2]
    assert len({groups[0], groups[3], groups[4]}) == 3


def test_a_group_is_named_by_its_smallest_image() -> None:
    groups = grouped([[0], [1], [2]], [7, 7, 0xFFFF << 20], ["ff" * 32, "0a" * 32, "bb" * 32])
    assert groups.keys(0, 3) == ["0a" * 8, "0a" * 8, "bb" * 8]
    assert groups.num_duplicates == 1
