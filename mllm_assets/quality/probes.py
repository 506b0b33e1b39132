"""Measure images and captions once; thresholds live in `verdicts`.

Brightness, blur and entropy follow cleanvision 0.3.7 (`issue_managers/image_property.py`), computed on the picture
reduced to 64 px as its blur probe does, so that a large photo costs little more than its decoding.
"""

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from mllm_assets.data.images import open_image, orientation, passes_through, sha256, upright_rgb

PROBE_VERSION = 3
SMALL_EDGE_PX = 64  # cleanvision's MAX_RESOLUTION_FOR_BLURRY_DETECTION
NEAR_EDGE_PX = 256  # the hash looks at 32 px, so a picture of this size holds all that it needs
COLOR_EDGE_PX = 4
LUMA_WEIGHTS = np.array([0.241, 0.691, 0.068])  # of squared RGB; cleanvision's perceived brightness
TOKEN = re.compile(r"\w+|[^\w\s]")
GRAY_TOLERANCE = 3  # of 255: what a JPEG of a grey picture deviates


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """Where decoding a stranger's image stops; see `QualitySpec`."""

    max_pixels: int
    max_bytes: int
    max_frames: int
    max_decode_s: float


# for what this project wrote: the dataset's own limits were applied before
OWN_FILES = DecodeLimits(max_pixels=2**31, max_bytes=2**31, max_frames=2**31, max_decode_s=600)


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
    num_frames: int | None = None
    orientation: int | None = None
    passes_through: bool | None = None
    is_grayscale: bool | None = None
    brightness_p5: float | None = None
    brightness_p99: float | None = None
    blur_edge_std: float | None = None
    gray_histogram_std: float | None = None
    entropy_bits: float | None = None
    phash_64: int | None = None
    color_48: str | None = None

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


def measure_image(data: bytes | None, limits: DecodeLimits) -> ImageMeasurement:
    """Decode an image once and measure it, of an animation its first frame. Never raises for what the bytes hold.

    Args:
        data: The file's bytes, None where there is no file.
        limits: A larger file is not opened, and of a header that declares more nothing is decoded (decompression
            bombs). The seconds are for `decoding.measure_images` to keep.
    """
    if data is None:
        return ImageMeasurement(image_sha256=sha256(b""), num_bytes=0, defect="image_missing")
    known: dict[str, Any] = {"image_sha256": sha256(data), "num_bytes": len(data)}
    if not data:
        return ImageMeasurement(**known, defect="image_empty")
    if len(data) > limits.max_bytes:
        return ImageMeasurement(**known, defect="image_too_many_bytes")
    try:
        with open_image(data) as image:
            known |= {"format": image.format, "mode": image.mode, "width_px": image.width, "height_px": image.height}
            if image.width * image.height > limits.max_pixels:
                return ImageMeasurement(**known, defect="image_too_many_pixels")
            known["num_frames"] = getattr(image, "n_frames", 1)
            if known["num_frames"] > limits.max_frames:
                return ImageMeasurement(**known, defect="image_too_many_frames")
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
    # Box means twice are box means once; only the entropy needs every pixel.
    near = image.reduce(max(1, max(image.size) // NEAR_EDGE_PX))
    small = near.copy()
    small.thumbnail((SMALL_EDGE_PX, SMALL_EDGE_PX), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float64).reshape(-1, 3)
    dark, light = _percentiles(pixels**2 @ LUMA_WEIGHTS, (5, 99))
    gray = small.convert("L")
    edges = gray.filter(ImageFilter.FIND_EDGES)
    return {
        "is_grayscale": _is_grayscale(small),
        "brightness_p5": _rounded(math.sqrt(dark) / 255),
        "brightness_p99": _rounded(math.sqrt(light) / 255),
        "blur_edge_std": _rounded(np.asarray(edges).std()),
        "gray_histogram_std": _rounded(np.std(gray.histogram())),
        "entropy_bits": _rounded(image.entropy()),
        "phash_64": perceptual_hash(near),
        "color_48": near.resize((COLOR_EDGE_PX, COLOR_EDGE_PX), Image.Resampling.BOX).tobytes().hex(),
    }


def _is_grayscale(image: Image.Image) -> bool:
    red, green, blue = image.split()
    return all(
        ImageChops.difference(green, other).getextrema()[1] <= GRAY_TOLERANCE  # type: ignore[operator]
        for other in (red, blue)
    )


def _percentiles(values: np.ndarray, percents: tuple[int, ...]) -> list[float]:
    """The nearest values at or below the percentiles; numpy's own interpolates and takes ten times as long."""
    ranks = [(len(values) - 1) * percent // 100 for percent in percents]
    return np.partition(values, ranks)[ranks].tolist()


def _rounded(value: Any) -> float:
    """Six digits: what is kept does not hang on the last bit of a machine's arithmetic."""
    return round(float(value), 6)


def perceptual_hash(image: Image.Image) -> int:
    """64-bit DCT hash (imagehash.phash) as an unsigned integer."""
    import imagehash

    bits = imagehash.phash(image).hash
    return int.from_bytes(np.packbits(bits.flatten()).tobytes(), "big")


def measure_caption(caption: str | None) -> dict[str, Any]:
    """Length and make-up of a caption; zeros where there is none.

    A token is a word or a punctuation mark; a model's tokenizer makes about 1.3 of it in English. `repeated_share` is
    the share of characters in the most frequent pair of words where that comes more than once (Gopher's "top 2-gram",
    Rae et al. 2021, table A1).
    """
    text = caption or ""
    words = text.lower().split()
    return {
        "caption_num_chars": len(text),
        "caption_num_words": len(words),
        "caption_num_unique_words": len(set(words)),
        "caption_num_tokens": len(TOKEN.findall(text)),
        "caption_repeated_share": _repeated_share(words),
        "caption_ascii_share": _ascii_share(text),
    }


def _ascii_share(text: str) -> float:
    if not text:
        return 0.0
    return 1.0 if text.isascii() else _rounded(sum(map(str.isascii, text)) / len(text))


def _repeated_share(words: list[str]) -> float:
    if len(set(pairwise(words))) >= len(words) - 1:
        return 0.0
    pairs = Counter(pairwise(words))
    count, length = max(((n, len(a) + len(b)) for (a, b), n in pairs.items() if n > 1), default=(0, 0))
    return _rounded(min(count * length / max(sum(map(len, words)), 1), 1.0))
