"""Changed copies of training images: seeded, the same bytes each time, and none that looks like a validation image."""

import hashlib
import io
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from mllm_assets.data.assign import TRAIN
from mllm_assets.data.images import open_image, sha256, upright_rgb
from mllm_assets.data.publish import ImageWriter, build_row, image_number
from mllm_assets.data.sources import read_raw
from mllm_assets.data.spec import DatasetSpec, QualitySpec
from mllm_assets.quality.probes import OWN_FILES, ImageMeasurement, measure_image

# a crop keeps at least this share of each edge: the captions are about the whole picture
MIN_CROP_SHARE = 0.8
COLOR_RANGE = (0.8, 1.2)


def operation_names(operations: Sequence[str]) -> list[tuple[str, str]]:
    """Operations with the names of their copies: a second "crop" is "crop_2", another crop of the same sample."""
    seen: Counter[str] = Counter()
    names = []
    for operation in operations:
        seen[operation] += 1
        names.append((operation, operation if seen[operation] == 1 else f"{operation}_{seen[operation]}"))
    return names


def augmented(data: bytes, operation: str, seed: str) -> bytes:
    """The PNG of a changed image.

    Args:
        data: An image that can be decoded.
        operation: "flip" (left and right), "crop" (80 to 100 % of each edge) or "color" (brightness, contrast and
            saturation by up to 20 %).
        seed: What the random numbers come from.
    """
    numbers = random.Random(hashlib.sha256(seed.encode()).digest())
    with open_image(data) as opened:
        opened.load()
        image = upright_rgb(opened)
    if operation == "flip":
        image = ImageOps.mirror(image)
    elif operation == "crop":
        image = _crop(image, numbers)
    else:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(numbers.uniform(*COLOR_RANGE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


class Forbidden:
    """Images that no augmented copy may look like: a mirrored training image can be a validation image."""

    def __init__(self, phash_N: NDArray[np.uint64], colors_NC: NDArray[np.uint8], limits: QualitySpec) -> None:
        self._limits = limits
        self._hashes = phash_N
        self._colors = colors_NC.astype(np.int16)

    def matches(self, data: bytes) -> bool:
        image = measure_image(data, OWN_FILES)
        if image.defect is not None or not len(self._hashes):
            return False
        return bool(self._near(image).any())

    def _near(self, image: ImageMeasurement) -> np.ndarray:
        distances = np.bitwise_count(self._hashes ^ np.uint64(image.phash_64 or 0))
        colors = np.array(list(bytes.fromhex(image.color_48 or "")), np.int16)
        differences = np.abs(self._colors - colors).mean(axis=1)
        limits = self._limits
        return (distances <= limits.duplicate_distance_bits) & (differences <= limits.duplicate_color_distance)


def _crop(image: Image.Image, numbers: random.Random) -> Image.Image:
    width, height = (max(1, round(edge * numbers.uniform(MIN_CROP_SHARE, 1.0))) for edge in image.size)
    left, top = numbers.randint(0, image.width - width), numbers.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """One changed copy of a training sample; without a row it was left out because it looks like validation.

    `number` orders the copies: by the sample's position, then by the operation.
    """

    number: int
    sample_id: str
    operation: str
    row: dict[str, Any] | None


def augmented_copies(
    spec: DatasetSpec, images: ImageWriter, raw: Path, positions_S: NDArray[np.int64], forbidden: Forbidden
) -> Iterator[Copy]:
    """A copy of each training sample per operation of `spec.augment`, in the order of the source.

    Args:
        spec: Names the operations and the seed.
        images: Publishes the copies' images.
        raw: The ingested source.
        positions_S: Each sample's position in the training split, negative where it is not in it.
        forbidden: The validation images.
    """
    names = operation_names(spec.augment)
    for sample, position in zip(read_raw(raw), positions_S.tolist(), strict=True):
        if position >= 0:
            for order, (operation, name) in enumerate(names):
                number = position * len(names) + order
                yield _copy(spec, images, sample, position, number, operation, name, forbidden)


def _copy(
    spec: DatasetSpec,
    images: ImageWriter,
    sample: Mapping[str, Any],
    position: int,
    number: int,
    operation: str,
    name: str,
    forbidden: Forbidden,
) -> Copy:
    sample_id = f"{sample['sample_id']}+{name}"
    seeds = [f"{spec.split.seed} {name} {image_id}" for image_id in sample["image_ids"]]
    changed = [augmented(data, operation, seed) for data, seed in zip(sample["images"], seeds, strict=True)]
    row = None
    if not any(forbidden.matches(data) for data in changed):
        paths = [
            images.write(data, sha256(data), f"{image_number(TRAIN, position, index)}_{name}")
            for index, data in enumerate(changed)
        ]
        lineage = {"id": sample_id, "source_id": sample["sample_id"], "augmentation": name}
        row = {**build_row(spec, sample, position, paths), **lineage}
    return Copy(number=number, sample_id=sample_id, operation=name, row=row)
