"""How many tokens an image takes and what stands around them, from the image's size alone.

LLaMA-Factory runs the whole image processor to count tokens; here the processor's own arithmetic is asked, so that
rows are encoded without decoding an image.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from mllm_assets.training.families import Family

# LLaMA-Factory's limits for Qwen (`Qwen2VLPlugin._preprocess_image`): shortest side, and ratio of the sides
QWEN_MIN_EDGE_PX = 28
QWEN_MAX_RATIO = 200
QWEN_CAPPED_RATIO = 180


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSlot:
    """What stands for one image in the text: `num_tokens` image tokens among it.

    `grid_thw` is its patches in time, height and width where the model wants to know; `num_patches` what the tower
    sees, None where it is what the model's image size says.
    """

    text: str
    num_tokens: int
    num_patches: int | None = None
    grid_thw: tuple[int, int, int] | None = None


class ImageSlots(Protocol):
    """One processor's way with images."""

    @property
    def needs_size(self) -> bool:
        """Whether the slot depends on the image."""
        ...

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        """Return the size to which an image is brought before the processor sees it."""
        ...

    def slot(self, width: int, height: int) -> ImageSlot:
        """Return what stands for an image of a size that `fitted` returned."""
        ...


@dataclass(frozen=True, slots=True)
class FixedSlots:
    """The same for every image: Gemma 3, LLaVA, PaliGemma."""

    one: ImageSlot
    needs_size: bool = False

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        return width, height

    def slot(self, width: int, height: int) -> ImageSlot:
        return self.one


@dataclass(frozen=True, slots=True)
class GridSlots:
    """Qwen: as many tokens as merged patches of the resized image."""

    image_processor: Any
    token: str
    needs_size: bool = True

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

        processor = self.image_processor
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
class BudgetSlots:
    """Gemma 4: the largest grid of the image's shape within the processor's budget."""

    image_processor: Any
    begin: str
    token: str
    end: str
    needs_size: bool = True

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        return width, height

    def slot(self, width: int, height: int) -> ImageSlot:
        from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

        processor = self.image_processor
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
        text = f"{self.begin}{self.token * num_tokens}{self.end}"
        return ImageSlot(text=text, num_tokens=num_tokens, num_patches=processor.max_soft_tokens * unit)


@dataclass(frozen=True, slots=True)
class TileSlots:
    """SmolVLM: tiles row by row, each named, and the whole image last."""

    image_processor: Any
    tokens_per_tile: int
    patches_per_tile: int
    needs_size: bool = True

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        return width, height

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


def image_slots(family: Family, processor: Any) -> ImageSlots:
    """Return one model's way with images, read from its processor."""
    image_processor, token = processor.image_processor, family.image_token
    match family.model_type:
        case "qwen2_5_vl" | "qwen3_vl":
            return GridSlots(image_processor, token)
        case "gemma4":
            return BudgetSlots(image_processor, processor.tokenizer.boi_token, token, processor.tokenizer.eoi_token)
        case "smolvlm":
            return TileSlots(image_processor, processor.image_seq_len, processor.patches_per_tile)
        case "llava":
            made = image_processor(Image.new("RGB", (64, 64)), return_tensors="np")["pixel_values"]
            patches = (made.shape[-2] // processor.patch_size) * (made.shape[-1] // processor.patch_size)
            num_tokens = patches + processor.num_additional_image_tokens
            num_tokens -= processor.vision_feature_select_strategy == "default"
            return FixedSlots(ImageSlot(text=token * num_tokens, num_tokens=num_tokens))
        case "paligemma":
            num_tokens = processor.image_seq_length
            return FixedSlots(ImageSlot(text=token * num_tokens, num_tokens=num_tokens))
        case _:
            num_tokens = processor.image_seq_length
            return FixedSlots(ImageSlot(text=processor.full_image_sequence, num_tokens=num_tokens))


def fit(image: Image.Image, slots: ImageSlots) -> Image.Image:
    """Bring an image to the size that `slots` wants, with Pillow's default filter as LLaMA-Factory does."""
    size = slots.fitted(image.width, image.height)
    return image if size == image.size else image.resize(size)
