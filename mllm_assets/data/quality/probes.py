"""Measure images and captions once; thresholds live in `verdicts`.

Brightness, blur and entropy follow cleanvision 0.3.7 (`issue_managers/image_property.py`), computed on the picture
reduced to 64 px as its blur probe does. The hash is imagehash's `phash`. A large JPEG is decoded at a half, a quarter
or an eighth of its size, which reads its file to the end all the same, so that damage is found anywhere in it.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter

from mllm_assets.data.ingest.images import PictureError, open_picture, orientation, passes_through, sha256, upright_rgb
from mllm_assets.data.ingest.spec import DecodeLimits

PROBE_VERSION = 5
SMALL_EDGE_PX = 64  # cleanvision's MAX_RESOLUTION_FOR_BLURRY_DETECTION
NEAR_EDGE_PX = 256  # the hash uses 32 px, so a picture of this size is enough
COLOR_EDGE_PX = 4
HASH_EDGE_PX = 32
# the 8 lowest frequencies of a discrete cosine transform (type 2) of so many values
COSINES_8H = np.cos(np.pi / HASH_EDGE_PX * np.outer(np.arange(8), np.arange(HASH_EDGE_PX) + 0.5))
LUMA_WEIGHTS = np.array([0.241, 0.691, 0.068])  # of squared RGB; cleanvision's perceived brightness
TOKEN = re.compile(r"\w+|[^\w\s]")
GRAY_TOLERANCE = 3  # of 255: what a JPEG of a grey picture deviates
# for files that this project wrote: the dataset's own limits were applied before
OWN_FILES = DecodeLimits(max_pixels=2**31, max_bytes=2**31, max_frames=2**31, max_decode_s=600)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageMeasurement:
    """Measurements of one image; they are None from the first step that failed, and `defect` says which.

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

    @property
    def colors(self) -> NDArray[np.uint8]:
        """The 48 bytes of `color_48`; zeros where there is no thumbnail."""
        return np.frombuffer(bytes.fromhex(self.color_48 or "00" * 48), np.uint8)


def measure_image(data: bytes | None, limits: DecodeLimits) -> ImageMeasurement:
    """Decode an image once and measure it, or an animation's first frame. Never raises because of its content.

    A file beyond `limits` is not opened, and a header that declares more is not decoded (decompression bombs); None is
    a missing file. `decoding.measure_images` also ends decoders that ignore the limit of seconds.
    """
    if data is None:
        return ImageMeasurement(image_sha256=sha256(b""), num_bytes=0, defect="image_missing")
    known: dict[str, Any] = {"image_sha256": sha256(data), "num_bytes": len(data)}
    try:
        with open_picture(data, limits=limits) as image:
            known |= {"format": image.format, "mode": image.mode, "width_px": image.width, "height_px": image.height}
            known["num_frames"] = getattr(image, "n_frames", 1)
            _draft(image)
            image.load()
            known |= {"orientation": orientation(image), "passes_through": passes_through(image)}
            return ImageMeasurement(**known, **_probe(upright_rgb(image)))
    except PictureError as error:
        return ImageMeasurement(**{"format": error.format, **known}, defect=error.defect)


def _draft(image: Image.Image) -> None:
    """Let a JPEG's decoder reduce it, to no less than the probes need."""
    factor = max(image.size) // NEAR_EDGE_PX
    if image.format == "JPEG" and factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))  # pyright: ignore[reportArgumentType]


def _probe(image: Image.Image) -> dict[str, Any]:
    # Box means of box means are box means; only the entropy needs every pixel.
    factor = max(image.size) // NEAR_EDGE_PX
    near = image.reduce(factor) if factor > 1 else image
    small = near.copy()
    small.thumbnail((SMALL_EDGE_PX, SMALL_EDGE_PX), Image.Resampling.BOX, reducing_gap=1.0)
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
        "phash_64": _perceptual_hash(near),
        "color_48": _means(near).tobytes().hex(),
    }


def _means(image: Image.Image) -> Image.Image:
    edge = (COLOR_EDGE_PX, COLOR_EDGE_PX)
    return image.resize(edge, Image.Resampling.BOX, reducing_gap=1.0)


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
    """Round to six digits, so that results do not depend on a machine's last bit."""
    return round(float(value), 6)


def _perceptual_hash(image: Image.Image) -> int:
    """64-bit DCT hash, as `imagehash.phash` defines it, as an unsigned integer."""
    edge = (HASH_EDGE_PX, HASH_EDGE_PX)
    gray = image.convert("L").resize(edge, Image.Resampling.LANCZOS, reducing_gap=3.0)
    low_88 = COSINES_8H @ np.asarray(gray, np.float64) @ COSINES_8H.T
    below, above = np.sort(low_88, axis=None)[31:33]  # numpy's median of 64 values takes twice as long
    return int.from_bytes(np.packbits(low_88 > (below + above) / 2).tobytes(), "big")


def measure_caption(caption: str | None) -> dict[str, Any]:
    """Length and composition of a caption; zeros for None.

    A token is a word or a punctuation mark; a model's tokenizer makes about 1.3 of one in English. `repeated_share` is
    the share of characters in the most frequent pair of words if it occurs more than once (Gopher's "top 2-gram",
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


def look_name(phash_64: int | None, color_48: str | None) -> str:
    """16 hex digits of what an image looks like (hash and colours); byte-wise copies share it."""
    return sha256(f"{phash_64} {color_48}".encode())[:16]
