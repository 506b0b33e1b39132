"""Near-duplicates: every pair within the distance, none that only shares a shape."""

import random

from made_images import encode, measure, picture
from PIL import Image, ImageEnhance

from mllm_assets.quality.duplicates import Pair, find_pairs, group_keys, group_samples, look_of
from mllm_assets.quality.probes import ImageMeasurement


def measured(phash: int, color: int = 0) -> ImageMeasurement:
    return ImageMeasurement(image_sha256=f"{phash:x}", num_bytes=1, phash_64=phash, color_48=bytes([color] * 48).hex())


def test_the_pairs_are_near_and_connect_what_comparing_all_connects() -> None:
    chooser = random.Random(3)
    hashes = [chooser.getrandbits(64) for _ in range(60)]
    for original in list(hashes):
        flipped = original
        for bit in chooser.sample(range(64), chooser.randint(1, 8)):
            flipped ^= 1 << bit
        hashes.append(flipped)
    images = {look_of(measured(phash)): phash for phash in hashes}
    names = sorted(images)
    for distance in (0, 1, 4, 7):
        found = find_pairs([measured(phash) for phash in hashes], distance_bits=distance, color_distance=255)
        everything = [
            Pair(a, b, (images[a] ^ images[b]).bit_count(), 0.0)
            for index, a in enumerate(names)
            for b in names[index + 1 :]
            if (images[a] ^ images[b]).bit_count() <= distance
        ]
        assert set(found) <= set(everything)
        looks = {name: [name] for name in names}
        assert group_samples(looks, found) == group_samples(looks, everything)


def test_the_same_shape_in_another_colour_is_another_picture() -> None:
    """A perceptual hash takes a blue heart for a brown one."""
    images = [measured(5, color=10), measured(5, color=200)]
    assert find_pairs(images, distance_bits=4, color_distance=8.0) == []
    assert len(find_pairs(images, distance_bits=4, color_distance=255.0)) == 1


def test_resized_and_recompressed_copies_are_found_and_other_pictures_are_not() -> None:
    originals = [measure(encode(picture(n, 128))) for n in range(40)]
    copies = [measure(encode(picture(n, 128).resize((64, 64)), "JPEG", quality=50)) for n in range(40)]
    copies += [measure(encode(ImageEnhance.Brightness(picture(n, 128)).enhance(0.98))) for n in range(40)]
    pairs = find_pairs([*originals, *copies], distance_bits=4, color_distance=8.0)
    owner = {look_of(image): number % 40 for number, image in enumerate([*originals, *copies])}
    assert {owner[pair.a] for pair in pairs if owner[pair.a] == owner[pair.b]} >= set(range(38))
    assert [pair for pair in pairs if owner[pair.a] != owner[pair.b]] == []


def test_a_thousand_blank_images_are_one_look() -> None:
    """Pairing every two of them would be half a million rows."""
    blank = measure(encode(Image.new("RGB", (32, 32), "white")))
    assert find_pairs([blank] * 1000, distance_bits=4, color_distance=8.0) == []


def test_groups_are_chains_of_shared_and_near_looks() -> None:
    looks = {"s1": ["a"], "s2": ["a", "b"], "s3": ["c"], "s4": ["d"], "s5": ["e"]}
    groups = group_samples(looks, [Pair("b", "c", 2, 1.0), Pair("d", "missing", 1, 1.0)])
    assert groups["s1"] == groups["s2"] == groups["s3"]
    assert len({groups["s1"], groups["s4"], groups["s5"]}) == 3


def test_a_group_is_named_by_its_smallest_image() -> None:
    keys = group_keys({"s1": 0, "s2": 0, "s3": 1}, {"s1": ["ff" * 32], "s2": ["0a" * 32], "s3": ["bb" * 32]})
    assert keys == {"s1": "0a" * 8, "s2": "0a" * 8, "s3": "bb" * 8}
