"""Probes measure what is there and never raise for what the bytes hold."""

import os
import random
import struct
import zlib

import imagehash
import numpy as np
import pytest
from PIL import Image

from mllm_assets.data.quality.probes import measure_caption
from tests.unit.data.quality.made_images import encode, measure, picture


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return start + encode(picture(1))[33:]


def test_a_picture_is_measured() -> None:
    image = measure(encode(picture(1, 96)))
    assert (image.format, image.mode, image.width_px, image.height_px) == ("PNG", "RGB", 96, 96)
    assert image.defect is None and image.passes_through is True and image.orientation == 1
    assert image.brightness_p5 is not None and image.brightness_p99 is not None and image.entropy_bits is not None
    assert 0 < image.brightness_p5 < image.brightness_p99 < 1
    assert 0 < image.entropy_bits <= 24
    assert image.phash_64 is not None and 0 < image.phash_64 < 2**64
    assert len(image.color_48 or "") == 96


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_each_common_format_is_read(kind: str) -> None:
    image = measure(encode(picture(1), kind))
    assert (image.defect, image.format) == (None, kind)


@pytest.mark.parametrize(
    ("data", "defect"),
    [
        (None, "image_missing"),
        (b"", "image_empty"),
        (b"<html>404</html>", "image_unreadable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_format_unsupported"),
        (encode(picture(1), "JPEG")[:-300], "image_truncated"),
        (encode(picture(1))[:150], "image_truncated"),
        (png_header(40_000, 40_000), "image_too_many_pixels"),
        (png_header(10_001, 10_000), "image_too_many_pixels"),
        (png_header(2_000, 2_000), "image_truncated"),
    ],
    ids=["none", "empty", "html", "eps", "cut-jpeg", "cut-png", "bomb", "over-the-limit", "header-lies"],
)
def test_a_bad_image_has_a_defect_and_raises_nothing(data: bytes | None, defect: str) -> None:
    assert measure(data).defect == defect


@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_jpeg_that_is_decoded_small_is_read_to_its_end(progressive: bool) -> None:
    noise = Image.effect_noise((1100, 700), 80).convert("RGB")
    data = encode(noise, "JPEG", progressive=progressive)
    whole = measure(data)
    assert (whole.defect, whole.width_px, whole.height_px) == (None, 1100, 700)
    assert measure(data[:-60]).defect == "image_truncated"


@pytest.mark.parametrize(("edge_px", "max_bits"), [(60, 0), (250, 4), (1100, 4)])
def test_the_hash_is_imagehashs(edge_px: int, max_bits: int) -> None:
    """Equal where no picture is reduced before; beyond, as near as copies of one picture are."""
    image = picture(3, edge_px)
    expected = int.from_bytes(np.packbits(imagehash.phash(image).hash.flatten()).tobytes(), "big")
    for kind in ("PNG", "JPEG"):
        found = measure(encode(image, kind)).phash_64
        assert found is not None and (found ^ expected).bit_count() <= max_bits + 2 * (kind == "JPEG")


def test_a_file_that_is_too_large_is_not_opened() -> None:
    image = measure(encode(picture(1)), max_bytes=100)
    assert (image.defect, image.width_px) == ("image_too_many_bytes", None)


def test_no_damage_of_a_file_raises() -> None:
    """Pillow's decoders raise nearly every class of exception for a flipped byte."""
    chooser = random.Random(7)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = encode(picture(3), kind)
        for _ in range(40):
            data = bytearray(whole)
            for _ in range(chooser.randint(1, 8)):
                data[chooser.randrange(len(data))] = chooser.randrange(256)
            measure(bytes(data), max_pixels=10**6)
    for size in (1, 10, 1000):
        assert measure(os.urandom(size)).defect is not None


def test_numbers_are_of_the_upright_picture() -> None:
    """A photo turned by EXIF and the same picture turned in pixels are duplicates."""
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = picture(5).resize((96, 48))
    turned = measure(encode(wide, "JPEG", exif=exif, quality=100))
    upright = measure(encode(wide.transpose(Image.Transpose.ROTATE_270), "JPEG", quality=100))
    assert turned.passes_through is False and upright.passes_through is True
    assert turned.phash_64 is not None and upright.phash_64 is not None
    assert (turned.phash_64 ^ upright.phash_64).bit_count() <= 4


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I", "F"])
def test_each_mode_is_measured(mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "F", "I") else "PNG"
    image = Image.new("I;16", (32, 32), 30_000) if mode == "I;16" else picture(1, 32).convert(mode)
    measured = measure(encode(image, kind))
    assert measured.defect is None
    assert measured.passes_through is (mode == "L")


def test_captions_are_counted() -> None:
    assert measure_caption("Red red heart ♥") == {
        "caption_num_chars": 15,
        "caption_num_words": 4,
        "caption_num_unique_words": 3,
        "caption_num_tokens": 4,
        "caption_repeated_share": 0.0,
        "caption_ascii_share": 0.933333,
    }
    assert measure_caption(None)["caption_num_chars"] == 0


def test_a_caption_that_repeats_itself_scores_high() -> None:
    assert measure_caption("a man with a man with a man with")["caption_repeated_share"] > 0.5
    assert measure_caption("a man with glasses and a shirt on")["caption_repeated_share"] == 0.0


def test_grey_is_seen_whatever_the_mode_says() -> None:
    grey = picture(1).convert("L")
    assert measure(encode(grey)).is_grayscale
    assert measure(encode(grey.convert("RGB"), "JPEG")).is_grayscale
    assert not measure(encode(picture(1))).is_grayscale
