"""Batches: padding, token types, pixels, and logits at supervised positions only.

Shape suffixes: B rows, T tokens of the longest row padded up to a multiple, N images over all rows, C H W pixels,
S supervised positions over all rows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch.nn import functional

from mllm_assets.errors import DataError
from mllm_assets.training.encode import IGNORE_INDEX, EncodedRow, image_token_id
from mllm_assets.training.families import processor_family
from mllm_assets.training.image_files import load_image
from mllm_assets.training.image_slots import TileSlots, image_slots
from mllm_assets.training.spec import IMAGE_MAX_PIXELS, IMAGE_MIN_PIXELS

if TYPE_CHECKING:
    from pathlib import Path


# What the families' towers take; the image processors return counts and layouts as well
TOWER_INPUTS = ("pixel_values", "image_grid_thw", "image_position_ids", "pixel_attention_mask")


class ImageFeatures(Protocol):
    """What stands in for pixels when the vision tower's output is cached."""

    def batch(self, paths: "Sequence[Path]") -> torch.Tensor:
        """Return a row of features for each token of the images, one image after another."""
        ...

    def blank(self, num_tokens: int) -> torch.Tensor:
        """Return the features of one image that nothing depends on, a row for each of its tokens."""
        ...


class HiddenStates(Protocol):
    """What stands in for tokens and pixels when the states at a boundary inside the language model are cached."""

    def batch(self, rows: Sequence[EncodedRow], length: int) -> torch.Tensor:
        """Return each row's states, padded on the right to `length` tokens."""
        ...


class Collator:
    """Turns encoded rows into what the model's `forward` takes.

    Args:
        processor: The model's processor, as `load_processor` returns it.
        image_max_pixels: Larger images are first shrunk to this area.
        image_min_pixels: Smaller ones are first enlarged to it.
        pad_to_multiple_of: LLaMA-Factory pads to 8 while training.
        padding_side: "right" to train, "left" to generate.
        select_logits: Compute logits at supervised positions only; the loss is the same, a 262k-wide softmax over the
            prompt is saved.
        features: Cached tower outputs that stand in for the pixels.
        hidden_states: Cached states that stand in for tokens and pixels.
        separate_packed_rows: Rows packed into one sequence do not see each other.
    """

    def __init__(
        self,
        processor: Any,
        *,
        image_max_pixels: int = IMAGE_MAX_PIXELS,
        image_min_pixels: int = IMAGE_MIN_PIXELS,
        pad_to_multiple_of: int = 8,
        padding_side: str = "right",
        select_logits: bool = True,
        features: ImageFeatures | None = None,
        hidden_states: HiddenStates | None = None,
        separate_packed_rows: bool = False,
    ) -> None:
        tokenizer, self.family = processor.tokenizer, processor_family(processor)
        self.image_processor = processor.image_processor
        self.slots = image_slots(self.family, processor)
        self.pad_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.image_token_id: int = image_token_id(processor)
        self.image_max_pixels = image_max_pixels
        self.image_min_pixels = image_min_pixels
        self.pad_to_multiple_of = pad_to_multiple_of
        self.padding_side = padding_side
        self.select_logits = select_logits
        self.features = features
        self.separate_packed_rows = separate_packed_rows
        self._blank_size = self.slots.fitted(64, 64)
        self._blank_slot = self.slots.slot(*self._blank_size)
        self.hidden_states = hidden_states

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        """Collate at least one row.

        Returns:
            input_ids_BT, attention_mask_BT, labels_BT (int64, -100 where nothing is learned); for families that want
            them token_type_ids_BT or mm_token_type_ids_BT (1 at image tokens; for PaliGemma 0 there and 1 after them)
            and image_grid_thw_N3; pixel_values, as the family's image processor makes them, or cached features; with
            `select_logits` also logits_to_keep_BT (bool) and shift_labels_S. While training, a batch without images
            carries a blank one behind its first row, which no token attends to: tower and projector then have gradients
            of zero in place of none, so that weight decay and momentum move them as in LLaMA-Factory. With cached
            `hidden_states` inputs_embeds_BTH in place of input_ids and pixel_values.

        Raises:
            DataError: An image is damaged. Names row and file.

        Source:
            Gemma 3 needs token_type_ids while training: huggingface/trl#5807. Without them no error is raised and
            image tokens stop attending to each other.
        """
        has_images = any(row.images for row in rows)
        needs_no_blank = has_images or self.padding_side == "left" or self.hidden_states is not None
        num_blank = 0 if needs_no_blank else self._blank_slot.num_tokens
        longest = max(len(rows[0].input_ids) + num_blank, *(len(row.input_ids) for row in rows))
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids_BT = self._pad([row.input_ids for row in rows], length, self.pad_id)
        input_ids_BT[0, len(rows[0].input_ids) :][:num_blank] = self.image_token_id
        labels_BT = self._pad([row.labels for row in rows], length, IGNORE_INDEX)
        batch = {
            "input_ids": input_ids_BT,
            "attention_mask": self._pad([(1,) * len(row.input_ids) for row in rows], length, 0),
            "labels": labels_BT,
            **self._token_types(input_ids_BT, rows, length),
        }
        if any(row.positions for row in rows):
            batch["position_ids"] = self._pad([row.positions for row in rows], length, 0)
            if self.separate_packed_rows:
                del batch["attention_mask"]  # `packed_attention` makes one of the positions
        if self.hidden_states is not None:
            batch["inputs_embeds"] = self.hidden_states.batch(rows, length)
            del batch["input_ids"]
        elif has_images:
            batch |= self._images(rows)
        elif num_blank:
            batch |= self._blank_image()
        if self.select_logits:
            shifted_BT = functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
            keep_BT = shifted_BT != IGNORE_INDEX
            if not keep_BT.any():
                raise DataError(f"No token is supervised in rows {', '.join(row.id for row in rows)}. Drop them.")
            batch |= {"logits_to_keep": keep_BT, "shift_labels": shifted_BT[keep_BT]}
        return batch

    def tower_inputs(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        """Return what the vision tower takes of all images in order: pixel_values and what goes with them.

        Raises:
            DataError: An image is damaged. Names row and file.
        """
        images = [
            load_image(
                path,
                max_pixels=self.image_max_pixels,
                min_pixels=self.image_min_pixels,
                row_id=row.id,
                slots=self.slots,
            )
            for row in rows
            for path in row.images
        ]
        return self._processed(images)

    def _processed(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        # SmolVLM's tiles are counted by the image
        arranged = [[image] for image in images] if isinstance(self.slots, TileSlots) else images
        made = self.image_processor(arranged, return_tensors="pt")
        return {name: made[name] for name in TOWER_INPUTS if name in made}

    def _blank_image(self) -> dict[str, torch.Tensor]:
        if self.features is None:
            return self._processed([Image.new("RGB", self._blank_size, "white")])
        grid = self._blank_slot.grid_thw
        return {"pixel_values": self.features.blank(self._blank_slot.num_tokens)} | (
            {"image_grid_thw": torch.tensor([grid])} if grid else {}
        )

    def _images(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        if self.features is None:
            return self.tower_inputs(rows)
        batch = {"pixel_values": self.features.batch([path for row in rows for path in row.images])}
        grids_thw = [grid for row in rows for grid in row.grids_thw]
        return batch | ({"image_grid_thw": torch.tensor(grids_thw)} if grids_thw else {})

    def _token_types(
        self, input_ids_BT: torch.Tensor, rows: Sequence[EncodedRow], length: int
    ) -> dict[str, torch.Tensor]:
        if self.family.token_types is None:
            return {}
        key, meaning = self.family.token_types
        is_image_BT = (input_ids_BT == self.image_token_id).long()
        if meaning == "images":
            return {key: is_image_BT}
        is_row_BT = self._pad([(1,) * len(row.input_ids) for row in rows], length, 0)
        return {key: is_row_BT & ~is_image_BT}

    def _pad(self, sequences: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
        padded_BT = torch.full((len(sequences), length), value, dtype=torch.long)
        for index, sequence in enumerate(sequences):
            at = slice(None, len(sequence)) if self.padding_side == "right" else slice(length - len(sequence), None)
            padded_BT[index, at] = torch.tensor(sequence, dtype=torch.long)
        return padded_BT
