"""Batches: padding, token types, pixels, and logits at supervised positions only.

Shape suffixes: B rows, T tokens of the longest row padded up to a multiple, N images over all rows, C H W pixels,
S supervised positions of the row that has most.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import get_worker_info

from mllm_assets.errors import DataError, IntegrityError
from mllm_assets.families.family import processor_family
from mllm_assets.file_digests import FileDigests
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.training.encoding.image_files import load_image
from mllm_assets.training.encoding.kept_pixels import KeptPixels
from mllm_assets.training.encoding.row import IGNORE_INDEX, EncodedRow
from mllm_assets.training.encoding.video_files import clip_frames
from mllm_assets.training.encoding.visual_tokens import image_slots, image_token_id, video_slots, video_token_id

if TYPE_CHECKING:
    from pathlib import Path


# Inputs of the families' towers; the image processors return counts and layouts as well
TOWER_INPUTS = ("pixel_values", "image_grid_thw", "image_position_ids", "pixel_attention_mask")
REFERENCE = "reference_logps"  # of the answers of pairs: the preferred ones, then the others
OTHERS, MARKS = "others", "marks"  # of marked answers: a batch of others, and which are good
PIXELS, VIDEO_PIXELS = "pixel_values", "pixel_values_videos"
NUM_CROPS = "num_crops"  # of each image, where parts of them are shown


class ImageFeatures(Protocol):
    """What replaces pixels when the vision tower's output is cached."""

    def batch(self, paths: "Sequence[Path]") -> torch.Tensor:
        """Return a row of features for each token of the images, one image after another."""
        ...

    def video_batch(self, paths: "Sequence[Path]") -> torch.Tensor:
        """Return a row of features for each token of the videos, one video after another."""
        ...

    def blank(self, num_tokens: int) -> torch.Tensor:
        """Return the features of one blank image, a row for each of its tokens."""
        ...


class HiddenStates(Protocol):
    """What replaces tokens and pixels when the states at a boundary inside the language model are cached."""

    def batch(self, rows: Sequence[EncodedRow], length: int) -> torch.Tensor:
        """Return each row's states, padded on the right to `length` tokens."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Padding:
    """Where the rows of a batch are padded, "right" to train and "left" to answer; LLaMA-Factory pads to 8."""

    side: Literal["right", "left"] = "right"
    multiple_of: int = 8


def side_by_side(rows: Sequence[EncodedRow]) -> Sequence[EncodedRow]:
    """What the model reads of rows: of pairs all preferred answers, and then the others."""
    return [*rows, *(row.other for row in rows if row.other is not None)]


class Collator:
    """Turns encoded rows into what the model's `forward` takes.

    Args:
        processor: The model's processor, as `load_processor` returns it.
        settings: Limits of an image's area.
        padding: How rows become equally long.
        select_logits: Compute logits at supervised positions only; the loss is the same, without a 262k-wide softmax
            over the prompt.
        features: Cached tower outputs that replace the pixels.
        hidden_states: Cached states that replace tokens and pixels.
        separate_packed_rows: Rows packed into one sequence do not see each other.
    """

    def __init__(
        self,
        processor: Any,
        settings: TurnSettings = TurnSettings(),
        *,
        padding: Padding = Padding(),
        select_logits: bool = True,
        features: ImageFeatures | None = None,
        hidden_states: HiddenStates | None = None,
        separate_packed_rows: bool = False,
    ) -> None:
        tokenizer, self.family = processor.tokenizer, processor_family(processor)
        self.image_processor = processor.image_processor
        self.slots, self.video_slots = image_slots(processor, settings), video_slots(processor)
        self.videos, self.video_token_id = settings.videos, video_token_id(processor)
        self.pad_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.image_token_id: int = image_token_id(processor)
        self.image_limits = {"max_pixels": settings.image_max_pixels, "min_pixels": settings.image_min_pixels}
        self.padding = padding
        self.select_logits = select_logits
        self.features = features
        self.separate_packed_rows = separate_packed_rows
        self._blank_size = self.slots.fitted(64, 64)
        self._blank_slot = self.slots.slot(*self._blank_size)
        self.hidden_states = hidden_states
        self.selects_by_mask = False  # on the CPU: no logit too many, where nothing waits for a device
        self.note_row: Callable[[str], None] | None = None  # told the row whose image is opened next
        self.digests: FileDigests | None = None  # of images that are refused if they changed when they are read
        self._kept: KeptPixels | None = None

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        """Collate at least one row; of pairs B is twice their number, as in `side_by_side`.

        Returns:
            input_ids_BT, attention_mask_BT, labels_BT (int64, -100 where nothing is learned); for families that want
            them token_type_ids_BT or mm_token_type_ids_BT (1 at image tokens; for PaliGemma 1 from the first supervised
            token on, nowhere in a prompt) and image_grid_thw_N3; pixel_values, as the family's image processor makes
            them, or cached features; with `select_logits` also logits_to_keep_BS, the places of supervised tokens, and
            shift_labels_BS, -100 where a row has fewer: for a mask, as with `selects_by_mask`, the host would wait for
            the GPU. While
            training, a batch without images carries a blank one after its first row, which no token attends to: tower
            and projector then have gradients of zero instead of none, so that weight decay and momentum move them as
            in LLaMA-Factory. With cached `hidden_states` inputs_embeds_BTH instead of input_ids and pixel_values.

        Raises:
            DataError: An image is damaged. Names row and file.

        Source:
            Gemma 3 needs token_type_ids while training: huggingface/trl#5807. Without them no error is raised, but
            image tokens do not attend to each other.
        """
        pairs, rows = rows, side_by_side(rows)
        has_images, has_videos = any(row.images for row in rows), any(row.videos for row in rows)
        needs_no_blank = has_images or has_videos or self.padding.side == "left" or self.hidden_states is not None
        num_blank = 0 if needs_no_blank else self._blank_slot.num_tokens
        longest = max(len(rows[0].input_ids) + num_blank, *(len(row.input_ids) for row in rows))
        length = -(-longest // self.padding.multiple_of) * self.padding.multiple_of
        input_ids_BT = self._pad([row.input_ids for row in rows], length, self.pad_id)
        input_ids_BT[0, len(rows[0].input_ids) :][:num_blank] = self.image_token_id
        labels_BT = self._pad([row.labels for row in rows], length, IGNORE_INDEX)
        batch = {
            "input_ids": input_ids_BT,
            "attention_mask": self._pad([array("i", [1]) * len(row.input_ids) for row in rows], length, 0),
            "labels": labels_BT,
            **self._token_types(input_ids_BT, rows, length),
        }
        if any(row.positions for row in rows):
            batch["position_ids"] = self._pad([row.positions for row in rows], length, 0)
            if self.separate_packed_rows:
                del batch["attention_mask"]  # the family's `packed_masks` makes one from the positions
        if self.hidden_states is not None:
            batch["inputs_embeds"] = self.hidden_states.batch(rows, length)
            del batch["input_ids"]
        elif has_images or has_videos:
            batch |= self._visuals(rows, has_images=has_images, has_videos=has_videos)
        elif num_blank:
            batch |= self._blank_image()
        batch.pop(NUM_CROPS, None)
        for name, token_id in ((PIXELS, self.image_token_id), (VIDEO_PIXELS, self.video_token_id)):
            if self.features is not None and name in batch:
                num_tokens = int((input_ids_BT == token_id).sum())
                self._require_a_feature_for_each_token(num_tokens, len(batch[name]), rows)
        if self.select_logits:
            batch |= self._supervised(labels_BT, rows)
        if any(row.reference for row in pairs):
            known = [row.reference or () for row in pairs]
            batch[REFERENCE] = torch.tensor([logps[side] for side in range(2) for logps in known])
        return batch

    def keep_pixels(self, kept: KeptPixels) -> None:
        """Read pictures once, as far as `kept` has room: where one that changes is refused, and each is seen alone."""
        if self.digests is not None and self.family.sees_each_alone and not self.slots.processing:
            self._kept = kept

    def _supervised(self, labels_BT: torch.Tensor, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        shifted_BT = functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
        keep_BT = shifted_BT != IGNORE_INDEX
        most = int(keep_BT.sum(dim=1).max())
        if not most:
            raise DataError(f"No token is supervised in rows {', '.join(row.id for row in rows)}. Drop them.")
        if self.selects_by_mask:
            return {"logits_to_keep": keep_BT, "shift_labels": shifted_BT[keep_BT]}
        places_BS = torch.argsort((~keep_BT).int(), dim=1, stable=True)[:, :most]  # the supervised ones, in order
        return {"logits_to_keep": places_BS, "shift_labels": shifted_BT.gather(1, places_BS)}

    def tower_inputs(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        """Return the vision tower's inputs for all images in order: pixel_values and what belongs to them.

        An image's parts follow it, and `num_crops` are how many. Rows of `EncodedRow.of_video` have no image, and give
        what the tower sees of the videos under the same names.

        Raises:
            DataError: An image is damaged. Names row and file.
            IntegrityError: One changed since its digest was taken. Names the file.
        """
        if rows[0].videos and not any(row.images for row in rows):
            if self.video_slots is not None and self.video_slots.are_pictures:
                return _padded([self._frames_of(row) for row in rows])
            return dict(zip((PIXELS, "image_grid_thw"), self._video_patches(rows), strict=True))
        places = [(path, row.id) for row in rows for path in row.images]
        if self._kept is not None and get_worker_info() is None:  # a loader process ends with its epoch
            return {"pixel_values": self._pixels_of(places, self._kept)}
        images = [self._opened(path, row_id) for path, row_id in places]
        if self.digests is not None:
            self.digests.require_unchanged(path for path, _ in places)
        return self._processed(images)

    def _pixels_of(self, places: "Sequence[tuple[Path, str]]", kept: KeptPixels) -> torch.Tensor:
        new = {path: row_id for path, row_id in places if path not in kept}
        images = [self._opened(path, row_id) for path, row_id in new.items()]
        made = dict(zip(new, self._processed(images)["pixel_values"], strict=True)) if new else {}
        if self.digests is not None:
            self.digests.require_unchanged(path for path, _ in places)
        kept.add(made)
        return torch.stack([made[path] if path in made else kept[path] for path, _ in places])

    def _opened(self, path: "Path", row_id: str) -> Image.Image:
        if self.note_row is not None:
            self.note_row(row_id)
        return load_image(path, **self.image_limits, row_id=row_id, slots=self.slots)

    def _processed(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        arranged = [[image] for image in images] if self.slots.by_image else images
        processed = self.image_processor(arranged, return_tensors="pt", **self.slots.processing)
        made = {name: processed[name] for name in TOWER_INPUTS if name in processed}
        if not self.slots.processing:
            return made
        return made | {NUM_CROPS: processed[NUM_CROPS] if NUM_CROPS in processed else processed["num_patches"] - 1}

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

    def _visuals(self, rows: Sequence[EncodedRow], *, has_images: bool, has_videos: bool) -> dict[str, torch.Tensor]:
        if has_videos and self.video_slots is not None and self.video_slots.are_pictures:
            return self._row_by_row(rows)
        return (self._images(rows) if has_images else {}) | (self._videos(rows) if has_videos else {})

    def _row_by_row(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        """The pictures and the videos of rows that have one kind each, in the order of their tokens."""
        shown = [row for row in rows if row.images or row.videos]
        if self.features is None:
            return _padded([self.tower_inputs([row]) for row in shown])
        found = [self.features.video_batch(r.videos) if r.videos else self.features.batch(r.images) for r in shown]
        return {PIXELS: torch.cat(found)}

    def _frames_of(self, row: EncodedRow) -> dict[str, torch.Tensor]:
        """Each video of a row as a picture of as many parts as it has frames."""
        pixels, grids_thw = self._video_patches([row])
        each = [frames_FCHW[None] for frames_FCHW in pixels.split(grids_thw[:, 0].tolist())]
        masks = [torch.ones_like(frames[:, :, 0], dtype=torch.long) for frames in each]
        return _padded([{PIXELS: p, "pixel_attention_mask": m} for p, m in zip(each, masks, strict=True)])

    def _videos(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        if self.features is None:
            pixels, grids_thw = self._video_patches(rows)
        else:
            pixels = self.features.video_batch([path for row in rows for path in row.videos])
            grids_thw = torch.tensor([grid for row in rows for grid in row.video_grids_thw])
        batch = {VIDEO_PIXELS: pixels, "video_grid_thw": grids_thw}
        if self.family.times_videos:
            batch["second_per_grid_ts"] = torch.tensor([s for row in rows for s in row.seconds_per_grid])
        return batch

    def _video_patches(self, rows: Sequence[EncodedRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the tower sees of the videos of rows, and their grids."""
        assert self.video_slots is not None, "rows with videos of other families are refused"
        places = [
            (path, grid, row.id) for row in rows for path, grid in zip(row.videos, row.video_grids_thw, strict=True)
        ]
        made = []
        for path, grid_thw, row_id in places:
            if self.note_row is not None:
                self.note_row(row_id)
            frames = clip_frames(path, self.videos, self.slots, row_id=row_id)
            made.append(torch.from_numpy(self.video_slots.patches(frames, grid_thw)))
        if self.digests is not None:
            self.digests.require_unchanged(path for path, _, _ in places)
        return torch.cat(made), torch.tensor([grid for _, grid, _ in places])

    def _require_a_feature_for_each_token(self, num_tokens: int, num_features: int, rows: Sequence[EncodedRow]) -> None:
        if num_tokens != num_features:
            raise IntegrityError(
                f"The cached vision features of rows {', '.join(row.id for row in rows)} do not fit: expected "
                f"{num_tokens} rows of them, one for each of their tokens, found {num_features}. Delete the cache's "
                "folder and make them again."
            )

    def _token_types(
        self, input_ids_BT: torch.Tensor, rows: Sequence[EncodedRow], length: int
    ) -> dict[str, torch.Tensor]:
        if self.family.token_types is None:
            return {}
        key, meaning = self.family.token_types
        if meaning == "images":
            types_BT = (input_ids_BT == self.image_token_id).long()
            if self.video_token_id is not None:
                types_BT += 2 * (input_ids_BT == self.video_token_id)
            return {key: types_BT}
        # what is supervised must not be seen from before it, so a prompt ends where the first label is
        num_before = [sum(1 for _ in takewhile(lambda label: label == IGNORE_INDEX, row.labels)) for row in rows]
        types = [array("i", [0] * n + [1] * (len(row.labels) - n)) for n, row in zip(num_before, rows, strict=True)]
        return {key: self._pad(types, length, 0)}

    def _pad(self, sequences: "Sequence[array[int]]", length: int, value: int) -> torch.Tensor:
        padded_BT = torch.full((len(sequences), length), value, dtype=torch.long)
        for index, sequence in enumerate(sequences):
            at = slice(None, len(sequence)) if self.padding.side == "right" else slice(length - len(sequence), None)
            padded_BT[index, at] = torch.frombuffer(sequence, dtype=torch.int32)
        return padded_BT


def _padded(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put pictures of several parts each under one another, with empty parts behind those of fewer."""
    most = max(part[PIXELS].shape[1] for part in parts)

    def full(tensor: torch.Tensor) -> torch.Tensor:
        missing = most - tensor.shape[1]
        return torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], dim=1)

    return {name: torch.cat([full(part[name]) for part in parts]) for name in parts[0]}


@dataclass(frozen=True, slots=True)
class MarkedCollator:
    """Batches of marked answers: with the marks, and a batch of the others beside it."""

    collator: Collator

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, Any]:
        """Collate at least one row; the reference's log-probabilities are of the answers, and then of the others."""
        own, others = zip(*(row.sequences for row in rows), strict=True)
        marks = torch.tensor([row.mark is True for row in rows])
        return {
            **self.collator(own),
            OTHERS: self.collator([replace(row, reference=None) for row in others]),
            MARKS: marks,
        }
