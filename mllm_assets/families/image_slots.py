"""How many tokens an image takes and which text surrounds them, from the image's size alone.

LLaMA-Factory runs the whole image processor to count tokens; here the processor's own arithmetic is used, so that
rows are encoded without decoding an image.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from PIL import Image

# LLaMA-Factory's limits for Qwen (`Qwen2VLPlugin._preprocess_image`): shortest side, and ratio of the sides
QWEN_MIN_EDGE_PX = 28
QWEN_MAX_RATIO = 200
QWEN_CAPPED_RATIO = 180


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSlot:
    """The text that represents one image, with `num_tokens` image tokens in it.

    `num_crops` is how many parts of it are seen beside the whole, with tokens of their own. `grid_thw` is its patches
    in time, height and width where the model needs them; `num_patches` is what the tower sees, None where that follows
    from the model's image size.
    """

    text: str
    num_tokens: int
    num_patches: int | None = None
    grid_thw: tuple[int, int, int] | None = None
    num_crops: int = 0


class ImageSlots(ABC):
    """How one processor treats images.

    Attributes:
        needs_size: Whether the slot depends on the image.
        by_image: Whether the image processor wants each image in a separate list, to count tiles per image.
        processing: What the image processor is told beside its own configuration.
    """

    needs_size = True
    by_image = False
    processing: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        """Return the size to which an image is scaled before the processor sees it."""
        return width, height

    @abstractmethod
    def slot(self, width: int, height: int) -> ImageSlot:
        """Return what represents an image of a size that `fitted` returned."""


@dataclass(frozen=True, slots=True)
class FixedSlots(ImageSlots):
    """The same for every image: Gemma 3, LLaVA, PaliGemma."""

    one: ImageSlot
    needs_size = False

    def slot(self, width: int, height: int) -> ImageSlot:
        return self.one


@dataclass(frozen=True, slots=True)
class AsTheyAre(ImageSlots):
    """Pictures that the processor alone knows to represent."""

    def slot(self, width: int, height: int) -> ImageSlot:
        raise NotImplementedError("the model's processor writes the text of pictures")


@dataclass(frozen=True, slots=True)
class PanAndScanSlots(ImageSlots):
    """Gemma 3 with `image_do_pan_and_scan`: the whole image, and the crops of one that is long.

    LLaMA-Factory gives the image processor these values, and announces crops where there are none too, which the
    library's processor does not; with transformers 5 it fails.
    """

    processor: Any
    token: str
    processing = MappingProxyType(
        {
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 256,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        }
    )

    def slot(self, width: int, height: int) -> ImageSlot:
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        _, *limits = self.processing.values()
        blank = np.broadcast_to(np.uint8(0), (3, height, width))  # takes no memory
        num_crops = len(Gemma3ImageProcessorPil.pan_and_scan(self.processor.image_processor, blank, *limits))
        text = self.processor.replace_image_token({"num_crops": [num_crops]}, 0)
        num_tokens = self.processor.image_seq_length * (1 + num_crops)
        return ImageSlot(text=text, num_tokens=num_tokens, num_crops=num_crops)


@dataclass(frozen=True, slots=True)
class GridSlots(ImageSlots):
    """Qwen: as many tokens as merged patches of the resized image."""

    processor: Any
    token: str

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        if min(width, height) < QWEN_MIN_EDGE_PX:
            width, height = max(width, QWEN_MIN_EDGE_PX), max(height, QWEN_MIN_EDGE_PX)
        if width / height > QWEN_MAX_RATIO:
            width = height * QWEN_CAPPED_RATIO
        if height / width > QWEN_MAX_RATIO:
            height = width * QWEN_CAPPED_RATIO
        return width, height

    def slot(self, width: int, height: int) -> ImageSlot:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        processor = self.processor.image_processor
        patch, merge = processor.patch_size, processor.merge_size
        resized_height, resized_width = smart_resize(
            height,
            width,
            factor=patch * merge,
            min_pixels=processor.size["shortest_edge"],
            max_pixels=processor.size["longest_edge"],
        )
        grid = (1, resized_height // patch, resized_width // patch)
        num_patches = math.prod(grid)
        num_tokens = num_patches // merge**2
        text = f"<|vision_start|>{self.token * num_tokens}<|vision_end|>"
        return ImageSlot(text=text, num_tokens=num_tokens, num_patches=num_patches, grid_thw=grid)


@dataclass(frozen=True, slots=True)
class BudgetSlots(ImageSlots):
    """Gemma 4: the largest grid of the image's shape within the processor's budget."""

    processor: Any
    token: str

    def slot(self, width: int, height: int) -> ImageSlot:
        from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

        processor, tokenizer = self.processor.image_processor, self.processor.tokenizer
        unit = processor.pooling_kernel_size**2
        resized_height, resized_width = get_aspect_ratio_preserving_size(
            height,
            width,
            patch_size=processor.patch_size,
            max_patches=processor.max_soft_tokens * unit,
            pooling_kernel_size=processor.pooling_kernel_size,
        )
        num_patches = (resized_height // processor.patch_size) * (resized_width // processor.patch_size)
        num_tokens = num_patches // unit
        text = f"{tokenizer.boi_token}{self.token * num_tokens}{tokenizer.eoi_token}"
        return ImageSlot(text=text, num_tokens=num_tokens, num_patches=processor.max_soft_tokens * unit)


@dataclass(frozen=True, slots=True)
class TileSlots(ImageSlots):
    """SmolVLM: tiles row by row, each named, and the complete image last."""

    image_processor: Any
    tokens_per_tile: int
    patches_per_tile: int
    by_image = True

    def slot(self, width: int, height: int) -> ImageSlot:
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        num_tiles, num_rows, num_columns = self.image_processor.get_number_of_image_patches(height, width, {})
        num_tiles = num_tiles or 1
        text = get_image_prompt_string(
            num_rows,
            num_columns,
            self.tokens_per_tile,
            fake_token_around_image="<fake_token_around_image>",
            image_token="<image>",
            global_image_token="<global-img>",
        )
        return ImageSlot(
            text=text, num_tokens=num_tiles * self.tokens_per_tile, num_patches=num_tiles * self.patches_per_tile
        )


@dataclass(frozen=True, slots=True)
class PatchSlots(ImageSlots):
    """InternVL: the patches of an image that is cut to the processor's size, and the complete image, or that alone.

    LLaMA-Factory's `crop_to_patches` cuts up to 12; without it the processor's own configuration says.
    """

    processor: Any
    token: str
    cuts: bool | None = None

    @property
    def processing(self) -> Mapping[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.cuts:
            return {"crop_to_patches": True, "max_patches": 12, "min_patches": 1}
        return {"crop_to_patches": self.processor.image_processor.crop_to_patches}

    def slot(self, width: int, height: int) -> ImageSlot:
        vision, read = self.processor.vision_config, self.processor.image_processor
        num_parts = int(read.get_number_of_image_patches(height, width, dict(self.processing)))
        num_tokens = int(self.processor.settings()["image_seq_length"]) * num_parts
        sides = zip(vision.image_size, vision.patch_size, strict=True)
        return ImageSlot(
            text=f"<img>{self.token * num_tokens}</img>",
            num_tokens=num_tokens,
            num_patches=num_parts * math.prod(size // patch for size, patch in sides),
            num_crops=num_parts - 1,
        )


def full_sequence(processor: Any, token: str) -> ImageSlots:
    """The processor's own text for an image: Gemma 3."""
    return FixedSlots(ImageSlot(text=processor.full_image_sequence, num_tokens=processor.image_seq_length))


def repeated_token(processor: Any, token: str) -> ImageSlots:
    """The image token as often as the processor says: PaliGemma."""
    num_tokens = processor.image_seq_length
    return FixedSlots(ImageSlot(text=token * num_tokens, num_tokens=num_tokens))


def token_per_patch(processor: Any, token: str) -> ImageSlots:
    """The image token for each patch, and for the class token where the model keeps it: LLaVA."""
    made = processor.image_processor(Image.new("RGB", (64, 64)), return_tensors="np")["pixel_values"]
    patches = (made.shape[-2] // processor.patch_size) * (made.shape[-1] // processor.patch_size)
    num_tokens = patches + processor.num_additional_image_tokens
    num_tokens -= processor.vision_feature_select_strategy == "default"
    return FixedSlots(ImageSlot(text=token * num_tokens, num_tokens=num_tokens))


def cut_patches(processor: Any, token: str) -> ImageSlots:
    """With `crop_to_patches`: InternVL, whose `processor` is an `ImageTextProcessor`."""
    return PatchSlots(processor, token, cuts=True)


def named_tiles(processor: Any, token: str) -> ImageSlots:
    """Image tokens tile by tile: SmolVLM, whose `processor` is an `ImageTextProcessor`."""
    image_processor = processor.image_processor
    side = image_processor.max_image_size["longest_edge"] // processor.vision_config.patch_size
    return TileSlots(image_processor, int(processor.settings()["image_seq_len"]), side**2)


def fit(image: Image.Image, slots: ImageSlots) -> Image.Image:
    """Scale an image to the size that `slots` wants, with Pillow's default filter as LLaMA-Factory does."""
    size = slots.fitted(image.width, image.height)
    return image if size == image.size else image.resize(size)
