"""Changed copies of training images: seeded, reproducible to the byte, and never like an image of val or test."""

import hashlib
import io
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from mllm_assets.data.curate.described import described
from mllm_assets.data.curate.publish import ImageWriter, build_row, image_number, row_messages
from mllm_assets.data.ingest.images import open_picture, sha256, upright_rgb
from mllm_assets.data.ingest.spec import DatasetSpec, QualitySpec
from mllm_assets.data.ingest.split_spec import TRAIN
from mllm_assets.data.quality.grouping import differences
from mllm_assets.data.quality.probes import OWN_FILES, measure_image
from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER

# a crop keeps at least this share of each edge: the captions are about the whole picture
MIN_CROP_SHARE = 0.8
COLOR_RANGE = (0.8, 1.2)
MATCHES = ("augmentation_matches_val", "augmentation_matches_test")
LEFT_OUT = "_left_out_"  # in the fate of a copy whose row's words name what the operation changes


def operation_names(operations: Sequence[str]) -> list[tuple[str, str]]:
    """Operations with the names of their copies: a second "crop" is "crop_2", another crop of the same sample."""
    seen: Counter[str] = Counter()
    names = []
    for operation in operations:
        seen[operation] += 1
        names.append((operation, operation if seen[operation] == 1 else f"{operation}_{seen[operation]}"))
    return names


def augmented(data: bytes, operation: str, seed: str) -> bytes:
    """The PNG of a changed image; `seed` seeds the random numbers.

    `operation` is "flip" (left and right), "crop" (80 to 100 % of each edge) or "color" (brightness, contrast and
    saturation by up to 20 %).
    """
    numbers = random.Random(hashlib.sha256(seed.encode()).digest())
    with open_picture(data, limits=OWN_FILES) as opened:
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
    """Images that no augmented copy may look like: a mirrored training image can be one of val or test."""

    def __init__(self, phash_N: NDArray[np.uint64], colors_NC: NDArray[np.uint8], limits: QualitySpec) -> None:
        self._limits = limits
        self._hashes = phash_N
        self._colors = colors_NC

    def matches(self, data: bytes) -> bool:
        image = measure_image(data, OWN_FILES)
        if image.defect is not None or not len(self._hashes):
            return False
        bits, colors = differences(self._hashes, self._colors, np.uint64(image.phash_64 or 0), image.colors)
        near = (bits <= self._limits.duplicate_distance_bits) & (colors <= self._limits.duplicate_color_distance)
        return bool(near.any())


def _crop(image: Image.Image, numbers: random.Random) -> Image.Image:
    width, height = (max(1, round(edge * numbers.uniform(MIN_CROP_SHARE, 1.0))) for edge in image.size)
    left, top = numbers.randint(0, image.width - width), numbers.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """One changed copy of a training sample; it has no row if it is left out.

    `number` orders the copies: by the sample's position, then by the operation. `fate` is the operation, or why
    the copy was left out: it looks like an image of val or test, or the row's words name what the operation changes.
    """

    number: int
    sample_id: str
    fate: str
    row: dict[str, Any] | None


def augmented_copies(
    spec: DatasetSpec,
    images: ImageWriter,
    rows: Iterable[Mapping[str, Any]],
    positions_S: NDArray[np.int64],
    forbidden: Mapping[str, Forbidden],
) -> Iterator[Copy]:
    """A copy of each training sample per operation of `spec.augment`, in the order of the source's `rows`.

    `positions_S` is each sample's position in the training split, negative where it is not in it; `forbidden` are the
    images of the other sides.
    """
    names = operation_names(spec.augment)
    for sample, position in zip(rows, positions_S.tolist(), strict=True):
        if position < 0 or not sample["images"]:
            continue
        messages = row_messages(spec, sample, position, len(sample["images"]))
        texts = [turn["content"].replace(IMAGE_PLACEHOLDER, "") for turn in messages] + [sample["label"] or ""]
        for order, (operation, name) in enumerate(names):
            sample_id, row = f"{sample['sample_id']}+{name}", None
            if operation not in spec.augment_all_rows and (what := described(texts, operation)):
                fate = f"{operation}{LEFT_OUT}{what}"
            elif side := _side_like(changed := _changed_images(spec, sample, operation, name), forbidden):
                fate = f"augmentation_matches_{side}"
            else:
                paths = [
                    images.write(data, sha256(data), f"{image_number(TRAIN, position, index)}_{name}")
                    for index, data in enumerate(changed)
                ]
                lineage = {"id": sample_id, "source_id": sample["sample_id"], "augmentation": name}
                fate, row = name, {**build_row(spec, sample, position, paths), **lineage}
            yield Copy(number=position * len(names) + order, sample_id=sample_id, fate=fate, row=row)


def _side_like(images: Sequence[bytes], forbidden: Mapping[str, Forbidden]) -> str | None:
    """The side that has an image like one of these."""
    return next((side for side, its in forbidden.items() if any(map(its.matches, images))), None)


def _changed_images(spec: DatasetSpec, sample: Mapping[str, Any], operation: str, name: str) -> list[bytes]:
    seeds = [f"{spec.split.seed} {name} {image_id}" for image_id in sample["image_ids"]]
    return [augmented(data, operation, seed) for data, seed in zip(sample["images"], seeds, strict=True)]
