"""Measure images and captions once; thresholds live in `verdicts`.

Brightness, blur and entropy follow cleanvision 0.3.7 (`issue_managers/image_property.py`), computed on the picture
reduced to 64 px as its blur probe does, so that a large photo costs little more than its decoding.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageStat

from mllm_assets.data.images import open_image, orientation, passes_through, sha256, upright_rgb

PROBE_VERSION = 1
SMALL_EDGE_PX = 64  # cleanvision's MAX_RESOLUTION_FOR_BLURRY_DETECTION
COLOR_EDGE_PX = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageMeasurement:
    """What one image's bytes are; numbers are None from the first step that failed, and `defect` says which.

    `phash_64` is a perceptual hash of 64 bits, `color_48` 4x4 RGB means (48 bytes as hex), both of the upright
    picture. `brightness_*` are percentiles of perceived brightness, 0..1. `entropy_bits` is of the histogram.
    """

    image_sha256: str
    num_bytes: int
    defect: str | None = None
    format: str | None = None
    mode: str | None = None
    width_px: int | None = None
    height_px: int | None = None
    orientation: int | None = None
    passes_through: bool | None = None
    brightness_p5: float | None = None
    brightness_p99: float | None = None
    blur_edge_std: float | None = None
    gray_histogram_std: float | None = None
    entropy_bits: float | None = None
    phash_64: int | None = None
    color_48: str | None = None

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


def measure_image(data: bytes | None, *, max_pixels: int, max_bytes: int) -> ImageMeasurement:
    """Decode an image once and measure it. Never raises for what the bytes hold.

    Args:
        data: The file's bytes, None or empty where the source has none.
        max_pixels: A header that declares more is not decoded (decompression bombs).
        max_bytes: A larger file is not opened.
    """
    data = data or b""
    digest = sha256(data)
    known: dict[str, Any] = {"image_sha256": digest, "num_bytes": len(data)}
    if not data:
        return ImageMeasurement(**known, defect="image_missing")
    if len(data) > max_bytes:
        return ImageMeasurement(**known, defect="image_too_many_bytes")
    try:
        with open_image(data) as image:
            known |= {"format": image.format, "mode": image.mode, "width_px": image.width, "height_px": image.height}
            if image.width * image.height > max_pixels:
                return ImageMeasurement(**known, defect="image_too_many_pixels")
            image.load()
            known |= {"orientation": orientation(image), "passes_through": passes_through(image)}
            return ImageMeasurement(**known, **_probe(upright_rgb(image)))
    except Image.DecompressionBombError:
        return ImageMeasurement(**known, defect="image_too_many_pixels")
    except Exception as error:  # Pillow's decoders raise nearly every class; the sample is rejected with a reason
        return ImageMeasurement(**known, defect=_defect(error, opened="width_px" in known))


def _defect(error: Exception, *, opened: bool) -> str:
    if not opened:
        return "image_unreadable"
    return "image_truncated" if "truncated" in str(error).lower() else "image_corrupt"


def _probe(image: Image.Image) -> dict[str, Any]:
    small = image.copy()
    small.thumbnail((SMALL_EDGE_PX, SMALL_EDGE_PX), Image.Resampling.BOX)
    red, green, blue = np.moveaxis(np.asarray(small, dtype=np.float64), 2, 0)
    brightness = np.sqrt(0.241 * red**2 + 0.691 * green**2 + 0.068 * blue**2) / 255
    dark, light = np.percentile(brightness, [5, 99])
    gray = small.convert("L")
    edges = gray.filter(ImageFilter.FIND_EDGES)
    return {
        "brightness_p5": _rounded(dark),
        "brightness_p99": _rounded(light),
        "blur_edge_std": _rounded(np.sqrt(ImageStat.Stat(edges).var[0])),
        "gray_histogram_std": _rounded(np.std(gray.histogram())),
        "entropy_bits": _rounded(image.entropy()),
        "phash_64": perceptual_hash(image),
        "color_48": image.resize((COLOR_EDGE_PX, COLOR_EDGE_PX), Image.Resampling.BOX).tobytes().hex(),
    }


def _rounded(value: Any) -> float:
    """Six digits: what is kept does not hang on the last bit of a machine's arithmetic."""
    return round(float(value), 6)


def perceptual_hash(image: Image.Image) -> int:
    """64-bit DCT hash (imagehash.phash) as an unsigned integer."""
    import imagehash

    bits = imagehash.phash(image).hash
    return int.from_bytes(np.packbits(bits.flatten()).tobytes(), "big")


def measure_caption(caption: str | None) -> dict[str, Any]:
    """Length and make-up of a caption; zeros where there is none."""
    text = caption or ""
    words = text.split()
    return {
        "caption_num_chars": len(text),
        "caption_num_words": len(words),
        "caption_num_unique_words": len({word.lower() for word in words}),
        "caption_ascii_share": _rounded(sum(char.isascii() for char in text) / len(text)) if text else 0.0,
    }
