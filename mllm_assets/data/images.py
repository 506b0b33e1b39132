"""Images as bytes: digests, safe opening, and what is published of them."""

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mllm_assets.data.spec import MAX_IMAGE_BYTES, MAX_PIXELS
from mllm_assets.errors import DataError

# Pillow also opens formats that run other programs (EPS calls ghostscript); a dataset gets none of those. JPEG covers
# the multi-picture files of phones, which then call themselves MPO.
SAFE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Formats and modes that LLaMA-Factory reads as they are; anything else is written again as PNG.
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
PLAIN_MODES = ("RGB", "L")
# no image file is larger, whatever a dataset's own `max_image_bytes` is: it would not fit into a column of Arrow
MAX_SOURCE_BYTES = 2**30
_AT_MOST = f"at most {MAX_PIXELS:,} are decoded. Shrink it."
# an EXIF chunk, the texts in which ImageMagick and XMP writers keep an orientation
_PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


def sha256(data: bytes) -> str:
    """The digest that names an image everywhere in this project."""
    return hashlib.sha256(data).hexdigest()


def open_image(data: bytes) -> Image.Image:
    """Read an image's header; nothing is decoded yet.

    Raises:
        Image.DecompressionBombError: The header declares more than twice Pillow's limit of pixels.
        OSError: Not an image of a safe format.
    """
    with warnings.catch_warnings():
        # the caller compares the size with the dataset's own limit
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=SAFE_FORMATS)


def require_decodable(file: bytes | Path, name: str) -> None:
    """Refuse an image that is too large before anything of it is decoded.

    Args:
        file: Its bytes, or where it is.
        name: What the error calls it.

    Raises:
        DataError: It has more than `MAX_IMAGE_BYTES` or `MAX_PIXELS`.
        OSError: Not an image.
    """
    num_bytes = len(file) if isinstance(file, bytes) else file.stat().st_size
    if num_bytes > MAX_IMAGE_BYTES:
        raise DataError(
            f"{name} has {num_bytes / 2**20:.1f} MiB, at most {MAX_IMAGE_BYTES // 2**20} are read. Shrink it."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with open_image(file) if isinstance(file, bytes) else Image.open(file) as image:
                width_px, height_px = image.size
    except Image.DecompressionBombError:
        raise DataError(f"{name} has more than {2 * MAX_PIXELS:,} pixels, {_AT_MOST}") from None
    if width_px * height_px > MAX_PIXELS:
        raise DataError(f"{name} has {width_px} x {height_px} pixels, {_AT_MOST}")


def orientation(image: Image.Image, data: bytes | None = None) -> int:
    """EXIF orientation, 1 (upright) when there is none.

    Args:
        image: An opened image.
        data: The file's bytes. Pillow decodes a whole PNG to see whether EXIF comes last; a look for the names of the
            chunks that can hold it is a hundred times as fast.
    """
    if image.format == "PNG" and data is not None and not any(name in data for name in _PNG_EXIF):
        return 1
    return int(image.getexif().get(0x0112, 1) or 1)


def passes_through(image: Image.Image, data: bytes | None = None) -> bool:
    """Whether the file's own bytes show the same to every reader: upright, no alpha, a common format."""
    return (
        image.format in EXTENSIONS
        and image.mode in PLAIN_MODES
        and orientation(image, data) == 1
        and "transparency" not in image.info
        and getattr(image, "n_frames", 1) == 1
    )


def upright_rgb(image: Image.Image) -> Image.Image:
    """The picture a person sees: EXIF orientation applied, alpha on white, 8 bits a channel, RGB."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or upright.mode in ("I", "F"):
        values = np.asarray(upright, dtype=np.float64)
        scale = 255.0 / max(float(values.max(initial=0.0)), 255.0)
        return Image.fromarray((values.clip(min=0.0) * scale).astype(np.uint8)).convert("RGB")
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, layer).convert("RGB")
    return upright.convert("RGB")


def published_bytes(data: bytes) -> tuple[bytes, str]:
    """The bytes and file extension under which an image is published.

    The source's own bytes where they pass through, otherwise a PNG of the upright RGB picture.
    """
    with open_image(data) as image:
        if passes_through(image, data) and image.format is not None:
            return data, EXTENSIONS[image.format]
        image.load()
        buffer = io.BytesIO()
        upright_rgb(image).save(buffer, format="PNG")
        return buffer.getvalue(), "png"
