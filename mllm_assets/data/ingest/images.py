"""Images as bytes: digests, safe opening, and the bytes that are published."""

import hashlib
import importlib
import importlib.util
import io
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mllm_assets.data.ingest.spec import DEFAULT_LIMITS, DecodeLimits
from mllm_assets.errors import DataError

# Pillow also opens formats that run other programs (EPS calls ghostscript); those are not opened. JPEG covers
# the multi-picture files of phones, which then call themselves MPO.
SAFE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "ICO")
# Formats and modes that LLaMA-Factory reads unchanged; anything else is converted to PNG.
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
PLAIN_MODES = ("RGB", "L")
DEEP_MODES = ("I", "F")
ALPHA_MODES = ("RGBA", "LA", "PA")
# chunks that may hold an orientation: EXIF, and the texts of ImageMagick and XMP writers
_PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


def sha256(data: bytes) -> str:
    """The digest that names an image everywhere in this project."""
    return hashlib.sha256(data).hexdigest()


class PictureError(DataError):
    """A picture that cannot be used: `defect` is the reject reason, `format` the file's format if it is known."""

    def __init__(self, defect: str, text: str, *, format: str | None = None) -> None:
        super().__init__(text)
        self.defect = defect
        self.format = format


@contextmanager
def open_picture(file: bytes | Path, *, limits: DecodeLimits = DEFAULT_LIMITS) -> Iterator[Image.Image]:
    """Open a picture of a safe format: the header is read and checked, nothing is decoded yet.

    Every picture of the product is opened here. The limit of CPU seconds and the error messages also cover decoding
    it in the `with` block, explicitly or not; other errors of the block come out unchanged.

    Raises:
        PictureError: Missing, empty, too large, of another format, damaged, or too slow to decode.
    """
    data = file if isinstance(file, bytes) else _read(file, limits)
    if not data:
        raise PictureError("image_empty", "it is empty")
    if len(data) > limits.max_bytes:
        raise _too_many_bytes(len(data), limits)
    formats = (*SAFE_FORMATS, "HEIF") if _registers_heif() else SAFE_FORMATS
    named = naming_damage(limits)
    with naming_damage(limits, unopened=data):
        opened = Image.open(_Timed(data, limits.max_decode_s), formats=formats)
    with opened as image:
        named(_check_header)(image, limits)
        for name in ("load", "getexif"):  # all that decodes goes through them
            setattr(image, name, named(getattr(image, name)))
        try:
            yield image
        finally:
            del image.load, image.getexif


@contextmanager
def naming_damage(limits: DecodeLimits = DEFAULT_LIMITS, *, unopened: bytes | None = None) -> Iterator[None]:
    """Make what Pillow raises a PictureError; `unopened` is a file whose format is not known yet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_header` has our own limit
            yield
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise PictureError("image_too_many_pixels", f"it has more than {limits.max_pixels:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise nearly every class
        raise _damage(error, unopened) from error


@cache
def _registers_heif() -> bool:
    """Whether HEIC is opened too: where the package pillow-heif is installed."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    importlib.import_module("pillow_heif").register_heif_opener()
    return True


def _read(path: Path, limits: DecodeLimits) -> bytes:
    try:
        num_bytes = path.stat().st_size
        if num_bytes > limits.max_bytes:
            raise _too_many_bytes(num_bytes, limits)
        with path.open("rb") as file:
            return file.read(limits.max_bytes + 1)
    except FileNotFoundError:
        raise PictureError("image_missing", "it does not exist") from None
    except OSError as error:
        raise PictureError("image_unreadable", f"it cannot be read ({error.strerror or error})") from None


def _check_header(image: Image.Image, limits: DecodeLimits) -> None:
    if image.width * image.height > limits.max_pixels:
        raise PictureError(
            "image_too_many_pixels", f"it has {image.width} x {image.height} pixels, expected at most "
            f"{limits.max_pixels:,}",
        )  # fmt: skip
    if (num_frames := getattr(image, "n_frames", 1)) > limits.max_frames:
        raise PictureError("image_too_many_frames", f"it has {num_frames} frames, expected at most {limits.max_frames}")


def _too_many_bytes(num_bytes: int, limits: DecodeLimits) -> PictureError:
    return PictureError(
        "image_too_many_bytes", f"it has {num_bytes / 2**20:.1f} MiB, expected at most {limits.max_bytes / 2**20:.0f}"
    )


def _damage(error: Exception, unopened: bytes | None) -> PictureError:
    if unopened is not None:
        if (found := unsupported_format(unopened)) is not None:
            hint = " (`pip install pillow-heif` lets it be read)" if found == "HEIF" else ""
            return PictureError("image_format_unsupported", f"it is {found}, which is not opened{hint}", format=found)
        return PictureError("image_unreadable", f"it is not a picture that can be read ({type(error).__name__})")
    defect = "image_truncated" if "truncated" in str(error).lower() else "image_corrupt"
    return PictureError(defect, f"it is damaged ({type(error).__name__}: {error})")


def unsupported_format(data: bytes) -> str | None:
    """The format of the first bytes if it is one that is not opened; no decoder runs."""
    start = data[:32]
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"heim", b"hevc", b"mif1", b"msf1"):
        return None if _registers_heif() else "HEIF"
    if start.startswith(b"%PDF"):
        return "PDF"
    if b"<svg" in data[:1024].lower():
        return "SVG"
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        with suppress(Exception):  # Pillow's plugins read bytes that may be missing
            if name not in SAFE_FORMATS and accepts is not None and accepts(start[:16]) is True:
                return name
    return None


class _Timed(io.BytesIO):
    """Bytes that raise once this thread has used its CPU seconds: a slow decoder is stopped when it asks for more."""

    def __init__(self, data: bytes, max_s: float) -> None:
        super().__init__(data)
        self._max_s = max_s
        self._deadline_s = time.thread_time() + max_s
        self._unlimited_s = time.monotonic() + max_s  # until then: a thread's own time is slower to ask for

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self._unlimited_s and time.thread_time() > self._deadline_s:
            raise PictureError("image_decode_too_slow", f"decoding it takes more than {self._max_s:g} s of CPU time")
        return super().read(size)


@naming_damage()
def orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 (upright) by default."""
    # Pillow decodes the complete PNG to see whether EXIF comes last; searching for the names of the chunks that can
    # hold it is a hundred times as fast
    file = getattr(image, "fp", None)
    if image.format == "PNG" and isinstance(file, _Timed) and not any(name in file.getvalue() for name in _PNG_EXIF):
        return 1
    return int(image.getexif().get(0x0112, 1) or 1)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the picture that `plain_picture` returns, from the header alone."""
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)  # 5 to 8 are quarter turns


def passes_through(image: Image.Image) -> bool:
    """Whether every reader shows the file's own bytes alike: upright, no alpha, a common format."""
    return (
        image.format in EXTENSIONS
        and image.mode in PLAIN_MODES
        and orientation(image) == 1
        and "transparency" not in image.info
        and getattr(image, "n_frames", 1) == 1
    )


def departure(mode: str, exif_orientation: int) -> str | None:
    """Why a decoder that ignores orientation and depth shows a different picture, or None.

    LLaMA-Factory's does: 16 bits are cut to white, floats to black, EXIF is ignored.
    """
    if mode in DEEP_MODES or mode.startswith("I;16"):
        return "more than 8 bits a channel, scaled to 8"
    return "an EXIF orientation, applied" if exif_orientation != 1 else None


def departure_text(why: str, num_pictures: int) -> str:
    pictures = "1 picture has" if num_pictures == 1 else f"{num_pictures} pictures have"
    return f"{pictures} {why}. LLaMA-Factory ignores that, so its models see another picture; see docs/models.md."


def plain_picture(image: Image.Image) -> Image.Image:
    """A decoded picture as a model sees it: upright, 8 bits a channel.

    All others are returned unchanged, in their own mode, and are resized and converted to RGB as LLaMA-Factory does.
    """
    return upright_rgb(image) if departure(image.mode, orientation(image)) else image


@naming_damage()
def upright_rgb(image: Image.Image) -> Image.Image:
    """The picture a person sees: EXIF orientation applied, alpha on white, 8 bits a channel, RGB.

    Raises:
        PictureError: Its EXIF is damaged, or its mode cannot be converted.
    """
    image.load()
    upright = image if orientation(image) == 1 else ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or upright.mode in DEEP_MODES:
        values = np.asarray(upright, dtype=np.float64)
        scale = 255.0 / max(float(values.max(initial=0.0)), 255.0)
        return Image.fromarray((values.clip(min=0.0) * scale).astype(np.uint8)).convert("RGB")
    if upright.mode in ALPHA_MODES or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, layer).convert("RGB")
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def published_bytes(data: bytes) -> tuple[bytes, str]:
    """The bytes and file extension under which an image is published.

    The source's own bytes where they pass through, otherwise a PNG of the upright RGB picture.
    """
    with open_picture(data) as image:
        if passes_through(image) and image.format is not None:
            return data, EXTENSIONS[image.format]
        image.load()
        buffer = io.BytesIO()
        upright_rgb(image).save(buffer, format="PNG")
        return buffer.getvalue(), "png"
