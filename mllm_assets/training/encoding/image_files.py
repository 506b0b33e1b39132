"""Image files as the processor gets them: RGB, within the recipe's limits of area, as LLaMA-Factory resizes them."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from mllm_assets.data.ingest.images import (
    PictureError,
    departure,
    naming_damage,
    open_picture,
    orientation,
    plain_picture,
    upright_size,
)
from mllm_assets.errors import DataError
from mllm_assets.families.image_slots import ImageSlots, fit
from mllm_assets.recipe.asking import IMAGE_MAX_PIXELS, IMAGE_MIN_PIXELS


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
    depends on it (5.9e-4 on photographs). `slots` may need another size after that.

    Raises:
        DataError: The file is not a picture that can be used. Names the row and the file.
    """
    with _naming(path, row_id):
        image = decoded(path, max_pixels=max_pixels, min_pixels=min_pixels)
    return image if slots is None else fit(image, slots)


def decoded(file: bytes | Path, *, max_pixels: int, min_pixels: int) -> Image.Image:
    """Decode a picture to RGB and to an area within the limits, as `load_image` does.

    Raises:
        PictureError: It cannot be used.
    """
    with open_picture(file) as opened, naming_damage():  # not every mode can be resized or converted
        opened.load()
        image = plain_picture(opened)
        for size in sizes_in_area(*image.size, max_pixels, min_pixels):
            image = image.resize(size)
        return image.convert("RGB")


def image_size(path: Path, *, max_pixels: int, min_pixels: int, row_id: str = "") -> tuple[int, int]:
    """Return the width and height that `load_image` would bring an image to, from its header alone.

    Raises:
        DataError: The file is not a picture that can be used. Names the row and the file.
    """
    with _naming(path, row_id), open_picture(path) as opened:
        size = upright_size(opened)
    return [size, *sizes_in_area(*size, max_pixels, min_pixels)][-1]


def departures(paths: Iterable[tuple[Path, str]]) -> Counter[str]:
    """Open every picture's header, and count those that LLaMA-Factory shows differently, by reason.

    Args:
        paths: Pictures, each with the id of the first row that uses it.

    Raises:
        DataError: A file is not a picture that can be used.
    """
    found: Counter[str] = Counter()
    for path, row_id in paths:
        with _naming(path, row_id), open_picture(path) as opened:
            if why := departure(opened.mode, orientation(opened)):
                found[why] += 1
    return found


@contextmanager
def _naming(path: Path, row_id: str) -> Iterator[None]:
    try:
        yield
    except PictureError as error:
        where = f" of row {row_id}" if row_id else ""
        cure = "Replace the file or drop the row." if row_id else "Give another file."
        raise DataError(f"The image {path}{where} cannot be used: {error}. {cure}") from error


def sizes_in_area(width: int, height: int, max_pixels: int, min_pixels: int) -> Iterator[tuple[int, int]]:
    """Yield the sizes that an image is resized to in turn, none if it fits."""
    for num_pixels, is_outside in ((max_pixels, int.__gt__), (min_pixels, int.__lt__)):
        if is_outside(width * height, num_pixels):
            factor = math.sqrt(num_pixels / (width * height))
            width, height = max(1, int(width * factor)), max(1, int(height * factor))
            yield width, height
