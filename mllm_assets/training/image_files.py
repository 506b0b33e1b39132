"""Image files as the processor gets them: RGB, within the recipe's limits of area, as LLaMA-Factory resizes them."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from mllm_assets.errors import DataError
from mllm_assets.training.image_slots import ImageSlots, fit
from mllm_assets.training.spec import IMAGE_MAX_PIXELS, IMAGE_MIN_PIXELS

if TYPE_CHECKING:
    from mllm_assets.training.encode import EncodedRow


def load_image(
    path: Path,
    *,
    max_pixels: int = IMAGE_MAX_PIXELS,
    min_pixels: int = IMAGE_MIN_PIXELS,
    row_id: str = "",
    slots: ImageSlots | None = None,
) -> Image.Image:
    """Open an image as RGB with at most `max_pixels` and at least `min_pixels` pixels.

    LLaMA-Factory resizes to that area with Pillow's default filter before the processor sees the image, and the loss
    depends on it (5.9e-4 on photographs). `slots` may want another size after that.

    Raises:
        DataError: The file is no image, or is damaged. Names the row and the file.
    """
    with _opened(path, row_id) as opened:
        opened.load()
        image = fit_area(opened, max_pixels=max_pixels, min_pixels=min_pixels)
        return image if slots is None else fit(image, slots)


def fit_area(image: Image.Image, *, max_pixels: int, min_pixels: int) -> Image.Image:
    """Bring a decoded image to RGB and to an area within the limits, as `load_image` does."""
    for size in _sizes_in_area(*image.size, max_pixels, min_pixels):
        image = image.resize(size)
    return image.convert("RGB")


def image_size(path: Path, *, max_pixels: int, min_pixels: int, row_id: str = "") -> tuple[int, int]:
    """Return the width and height that `load_image` would bring an image to, from its header alone.

    Raises:
        DataError: The file is no image. Names the row and the file.
    """
    with _opened(path, row_id) as opened:
        size = opened.size
    return [size, *_sizes_in_area(*size, max_pixels, min_pixels)][-1]


@contextmanager
def _opened(path: Path, row_id: str) -> Iterator[Image.Image]:
    where = f" of row {row_id}" if row_id else ""
    try:
        with Image.open(path) as opened:
            yield opened
    except FileNotFoundError:
        raise DataError(f"The image {path}{where} does not exist. Make the dataset again, or drop the row.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        cure = "Replace the file or drop the row." if row_id else "Give another file."
        raise DataError(f"The image {path}{where} cannot be read ({type(error).__name__}: {error}). {cure}") from error


def _sizes_in_area(width: int, height: int, max_pixels: int, min_pixels: int) -> Iterator[tuple[int, int]]:
    """Yield the sizes that an image is resized to in turn, none where it fits."""
    for num_pixels, is_outside in ((max_pixels, int.__gt__), (min_pixels, int.__lt__)):
        if is_outside(width * height, num_pixels):
            factor = math.sqrt(num_pixels / (width * height))
            width, height = max(1, int(width * factor)), max(1, int(height * factor))
            yield width, height


def check_image_headers(rows: "Iterable[EncodedRow]") -> None:
    """Open every image's header, so that a wrong file is named before the first step, not in the middle of training.

    Raises:
        DataError: A file is missing or is no image.
    """
    seen: set[Path] = set()
    for row in rows:
        for path in row.images:
            if path in seen:
                continue
            seen.add(path)
            try:
                with Image.open(path):
                    pass
            except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
                load_image(path, row_id=row.id)
