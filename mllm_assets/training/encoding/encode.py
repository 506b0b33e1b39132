"""A ShareGPT row becomes token ids and labels exactly as LLaMA-Factory makes them.

`turns.py` says how a conversation is tokenised. Here it is cut to `cutoff_len`, and each token of an answer, its end of
turn included, becomes a label; so do those of a question with `train_on_prompt`.
Source: llamafactory 0.9.5, `data/mm_plugin.py` and `data/processor/supervised.py`.
"""

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import transformers

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json
from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from mllm_assets.errors import DataError
from mllm_assets.families.family import find_template, processor_family
from mllm_assets.families.image_slots import ImageSlot
from mllm_assets.families.video_slots import VideoSlot
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.training.encoding.image_files import image_size
from mllm_assets.training.encoding.row import IGNORE_INDEX, EncodedRow, Tokens
from mllm_assets.training.encoding.turns import (
    ImageTurns,
    Lengths,
    Turn,
    TurnTokenizer,
    kept_lengths,
    shared_room,
    smallest_cutoff_len,
)
from mllm_assets.training.encoding.video_files import clip_of
from mllm_assets.training.encoding.visual_tokens import (
    image_slots,
    image_token_id,
    refuse_videos,
    video_slots,
    video_token_id,
)

if TYPE_CHECKING:
    from mllm_assets.data.sharegpt.rows import Row


def _ignored(count: int) -> Tokens:
    return array("i", [IGNORE_INDEX]) * count


def _numbers(tokens: Tokens) -> np.ndarray:
    return np.frombuffer(tokens, np.int32)


class ImageCutError(DataError):
    """`cutoff_len` cuts into an image or a video."""


@dataclass(frozen=True, slots=True)
class Media:
    """What represents a row's pictures and videos."""

    images: Sequence[ImageSlot]
    videos: Sequence[VideoSlot] = ()


class Encoder:
    """Encodes rows for one model's processor.

    Args:
        processor: The model's processor, as `load_processor` returns it.
        settings: The turn format and its limits.
        train_on_prompt: Questions are supervised as well.
        mask_history: Only the last answer is supervised, and a cut takes the first turns.
        preserve_thinking: Reasoning stays in the answers that `mask_history` masks.
        num_embeddings: Rows of the model's embedding; without it token ids are not compared with them.

    Raises:
        ModelError: The tokenizer lacks the family's image token.
    """

    def __init__(
        self,
        processor: Any,
        settings: TurnSettings = TurnSettings(),
        *,
        train_on_prompt: bool = False,
        mask_history: bool = False,
        preserve_thinking: bool = False,
        num_embeddings: int | None = None,
    ) -> None:
        family = processor_family(processor)
        self.cutoff_len = settings.cutoff_len
        self.template = find_template(settings.template, family)
        self.image_token_id = image_token_id(processor)
        self.turns = TurnTokenizer(
            processor.tokenizer,
            self.template,
            image_token=family.image_token,
            system=settings.system,
            enable_thinking=settings.enable_thinking,
        )
        self.train_on_prompt = train_on_prompt
        self.mask_history = mask_history
        self._drops_history_thought = mask_history and not preserve_thinking
        self._processor, self._tokenizer, self._num_embeddings = processor, processor.tokenizer, num_embeddings
        self._slots, self._video_slots = image_slots(processor, settings), video_slots(processor)
        self._videos = settings.videos
        self.video_token_id = video_token_id(processor)
        self._visual_ids = {self.image_token_id, self.video_token_id}
        self._lacks_embeddings = self._has_beyond(processor.tokenizer)
        self._image_limits = {"max_pixels": settings.image_max_pixels, "min_pixels": settings.image_min_pixels}

    @property
    def sees_sizes(self) -> bool:
        """Whether a row's tokens depend on the sizes of its images."""
        return self._slots.needs_size

    def describe(self) -> dict[str, Any]:
        """All that a row's tokens depend on but the row, as JSON."""
        tokenizer, turns = self._tokenizer, self.turns
        known = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
        return {
            "tokenizer": [type(tokenizer).__name__, digest_json([known, tokenizer.special_tokens_map])],
            "images": [
                self._processor.image_processor.to_dict(),
                self._image_limits,
                type(self._slots).__name__,
                repr(self._slots.slot(64, 64)),
            ],
            **({} if self._video_slots is None else {"videos": [self._video_slots.describe(), asdict(self._videos)]}),
            "template": asdict(self.template),
            "turns": [turns.system, turns.enable_thinking],
            "limits": [self.cutoff_len, self._num_embeddings],
            "labels": [self.train_on_prompt, self.mask_history, self._drops_history_thought],
            "versions": [__version__, tokenizers.__version__, transformers.__version__],
        }

    def encode(self, row: "Row") -> EncodedRow:
        """Encode all turns of a row, answers supervised.

        Raises:
            ImageCutError: `cutoff_len` cuts into an image. Names the row.
            DataError: `cutoff_len` leaves no supervised token, the text itself holds control tokens, or an image is
                damaged. Names the row.
        """
        if row.mark is False:
            raise DataError(
                f"Row {row.id} is marked as a bad answer (kto_tag: false), and would be learnt. Set stage: kto, which "
                "learns from both kinds, or take the row out."
            )
        media = self.media(row)
        input_ids = self._leading_images(media)
        labels, num_learnt = _ignored(len(input_ids)), 0
        turns = self._turns(row, media, for_last_answer=self._drops_history_thought)
        lengths = [(len(source), len(target)) for source, target in turns]
        kept = kept_lengths(lengths, self.cutoff_len - len(input_ids), last_first=self.mask_history)
        num_tokens_cut = sum(map(sum, lengths)) - sum(map(sum, kept))
        if num_tokens_cut:
            self._require_whole_images(row, turns, kept, num_leading=len(input_ids))
        for index, ((source, target), (source_len, target_len)) in enumerate(zip(turns, kept, strict=True)):
            is_history = self.mask_history and index < len(turns) - 1
            source, target = source[:source_len], target[:target_len]
            input_ids += source + target
            labels += source if self.train_on_prompt else _ignored(source_len)
            labels += _ignored(target_len) if is_history else target
            num_learnt += source_len * self.train_on_prompt + target_len * (not is_history)
        encoded = self._row(row, media, input_ids, labels, num_tokens_cut)
        if not num_learnt:
            raise DataError(
                f"Row {row.id} supervises no token: cutoff_len is {self.cutoff_len}, and its answers are empty or cut "
                f"off ({num_tokens_cut} tokens). Raise cutoff_len or drop the row."
            )
        return encoded

    def encode_pair(self, row: "Row") -> EncodedRow:
        """Encode a row's last answer, which is preferred, and its `rejected` one after the same question.

        Source: llamafactory 0.9.5, `PairwiseDatasetProcessor`.

        Raises:
            DataError: As `encode`, and where `cutoff_len` cuts into an image.
        """
        assert row.rejected is not None, "the entry sets `ranking`"
        media = self.media(row)
        [(prompt, _), _] = turns = [
            self._last_turn(replace(row, messages=(*row.messages[:-1], answer)), media)
            for answer in (row.messages[-1], row.rejected)
        ]
        room = shared_room(len(prompt), max(len(target) for _, target in turns), self.cutoff_len)
        chosen, rejected = (self._row_of(row, media, prompt, target, room) for _, target in turns)
        if not chosen.num_supervised or not rejected.num_supervised:
            raise DataError(f"Row {row.id} has an empty answer. Write both answers of the pair, or drop the row.")
        return replace(chosen, other=rejected)

    def encode_marked(self, row: "Row") -> EncodedRow:
        """Encode a row's last answer with its mark, uncut: what is left of it depends on the answer beside it.

        Its `num_tokens_cut` are those that `cutoff_len` takes of it alone.

        Raises:
            DataError: As `encode`, and where the answer is empty.
        """
        assert row.mark is not None, "the entry names a `kto_tag`"
        media = self.media(row)
        prompt, target = self._last_turn(row, media)
        if not row.messages[-1].content:
            raise DataError(f"Row {row.id} has an empty answer. Write it, or drop the row.")
        room = shared_room(len(prompt), len(target), self.cutoff_len)
        num_cut = self._row_of(row, media, prompt, target, room).num_tokens_cut
        whole = self._row_of(row, media, prompt, target, (len(prompt), len(target)))
        return replace(whole, num_tokens_cut=num_cut, mark=row.mark)

    def _last_turn(self, row: "Row", media: Media) -> tuple[Tokens, Tokens]:
        """All that precedes a row's last answer, and that."""
        *earlier, (question, target) = self._turns(row, media, for_last_answer=True)
        prompt = self._leading_images(media)
        for source, told in earlier:
            prompt += source + told
        return prompt + question, target

    def _row_of(self, row: "Row", media: Media, prompt: Tokens, target: Tokens, room: tuple[int, int]) -> EncodedRow:
        """A question and its answer, which is learnt, each cut to its room."""
        num_prompt, num_answer = room
        if self._end_of_images(prompt) > num_prompt:
            raise DataError(f"Row {row.id} is cut inside its images: cutoff_len is {self.cutoff_len}. Raise it.")
        kept, told = prompt[:num_prompt], target[:num_answer]
        num_cut = len(prompt) + len(target) - len(kept) - len(told)
        return self._row(row, media, kept + told, _ignored(len(kept)) + told, num_cut)

    def encode_prompt(self, row: "Row") -> EncodedRow:
        """Encode what precedes a row's last answer, up to where the model answers; all labels are -100.

        Reasoning is taken out of earlier answers, as in LLaMA-Factory's predictions and the models' chat templates.

        Raises:
            DataError: The text itself holds control tokens, or an image is damaged. Names the row.
        """
        media = self.media(row)
        prompt, _ = self._last_turn(row, media)
        return self._row(row, media, prompt, _ignored(len(prompt)), 0)

    def _row(self, row: "Row", media: Media, input_ids: Tokens, labels: Tokens, num_tokens_cut: int) -> EncodedRow:
        encoded = EncodedRow(
            id=row.id,
            input_ids=input_ids,
            labels=labels,
            images=tuple(row.images),
            num_tokens_cut=num_tokens_cut,
            videos=tuple(row.videos),
            video_grids_thw=tuple(slot.grid_thw for slot in media.videos),
            seconds_per_grid=tuple(slot.seconds_per_grid for slot in media.videos),
        )
        if self._slots.needs_size:
            patches = [slot.num_patches for slot in (*media.images, *media.videos)]
            encoded = replace(
                encoded,
                grids_thw=tuple(slot.grid_thw for slot in media.images if slot.grid_thw is not None),
                num_patches=sum(n for n in patches if n is not None) if any(patches) else None,
                num_crops=sum(slot.num_crops for slot in media.images),
            )
        if self.video_token_id != self.image_token_id:
            self._require_tokens(row, input_ids, self.image_token_id, media.images, IMAGE_PLACEHOLDER)
            self._require_tokens(row, input_ids, self.video_token_id, media.videos, VIDEO_PLACEHOLDER)
        elif media.videos:
            self._require_tokens(row, input_ids, self.video_token_id, media.videos, VIDEO_PLACEHOLDER)
        else:
            self._require_tokens(row, input_ids, self.image_token_id, media.images, IMAGE_PLACEHOLDER)
        self._require_embedded(encoded)
        return encoded

    def _require_tokens(
        self,
        row: "Row",
        input_ids: Tokens,
        token_id: int | None,
        slots: Sequence[ImageSlot] | Sequence[VideoSlot],
        placeholder: str,
    ) -> None:
        if token_id is None:
            return
        found = np.count_nonzero(_numbers(input_ids) == token_id)
        expected = sum(slot.num_tokens for slot in slots)
        if found != expected:
            kind = placeholder.strip("<>")
            raise DataError(
                f"Row {row.id} has {found} {kind} tokens, expected {expected} for its {len(slots)} {kind}s. Check "
                f"the {placeholder} placeholders of its user messages."
            )

    def media(self, row: "Row") -> Media:
        """What represents a row's pictures and videos; raises as `encode`."""
        return Media(self._image_slots(row), self._slots_of_videos(row) if row.videos else ())

    def _image_slots(self, row: "Row") -> list[ImageSlot]:
        if not self._slots.needs_size:
            return [self._slots.slot(0, 0)] * len(row.images)
        sizes = (image_size(path, row_id=row.id, **self._image_limits) for path in row.images)
        return [self._slots.slot(*self._slots.fitted(*size)) for size in sizes]

    def _slots_of_videos(self, row: "Row") -> list[VideoSlot]:
        if self._video_slots is None:
            refuse_videos(row, self._processor)
        if self._video_slots.are_pictures and row.images:
            name = processor_family(self._processor).name
            raise DataError(f"Row {row.id} has images and videos, and {name} takes one kind a row. Show one of them.")
        clips = (clip_of(path, self._videos, self._slots, row_id=row.id) for path in row.videos)
        return [self._video_slots.slot(clip) for clip in clips]

    def _turns(self, row: "Row", media: Media, *, for_last_answer: bool = False) -> list[Turn]:
        # with images before the first text their placeholders become nothing
        texts = ["" if self.template.images_first else slot.text for slot in media.images]
        video_texts = [slot.text for slot in media.videos]
        return self.turns.tokenize(row, texts, video_texts, for_last_answer=for_last_answer)

    def _leading_images(self, media: Media) -> Tokens:
        num_tokens = sum(slot.num_tokens for slot in media.images) if self.template.images_first else 0
        return array("i", [self.image_token_id]) * num_tokens

    def _require_whole_images(
        self, row: "Row", turns: Sequence[Turn], kept: Sequence[Lengths], *, num_leading: int
    ) -> None:
        """Raise an `ImageCutError` for a cut into an image."""
        image_turns = self._image_turns(turns, num_leading)
        if image_turns.fits(self.cutoff_len, last_first=self.mask_history):
            return
        parts = [
            part[:length] for turn, k in zip(turns, kept, strict=True) for part, length in zip(turn, k, strict=True)
        ]
        left, total = (
            sum(part.count(id_) for part in some for id_ in self._visual_ids if id_ is not None)
            for some in (parts, [part for turn in turns for part in turn])
        )
        kind = "image" if not row.videos else "image and video"
        least = smallest_cutoff_len([image_turns], self.cutoff_len, last_first=self.mask_history)
        raise ImageCutError(
            f"Row {row.id} is cut inside its images: cutoff_len {self.cutoff_len} leaves {left} of {total} {kind} "
            f"tokens. Set cutoff_len: {least} or more, or drop the row."
        )

    def image_turns(self, row: "Row") -> ImageTurns:
        """Return a row's turns, to find how short it may be cut."""
        media = self.media(row)
        turns = self._turns(row, media, for_last_answer=self._drops_history_thought)
        return self._image_turns(turns, len(self._leading_images(media)))

    def _image_turns(self, turns: Sequence[Turn], num_leading: int) -> ImageTurns:
        return ImageTurns(
            lengths=[(len(source), len(target)) for source, target in turns],
            needed=[(self._end_of_images(source), self._end_of_images(target)) for source, target in turns],
            num_leading=num_leading,
        )

    def _end_of_images(self, tokens: Sequence[int]) -> int:
        return max((index + 1 for index, token in enumerate(tokens) if token in self._visual_ids), default=0)

    def _has_beyond(self, tokenizer: Any) -> bool:
        """Whether the tokenizer has ids that the model's embedding has no row for."""
        limit = self._num_embeddings
        return limit is not None and any(
            i >= limit and i not in self._visual_ids for i in tokenizer.get_vocab().values()
        )

    def _require_embedded(self, row: EncodedRow) -> None:
        """Refuse tokens that the tokenizer has and the model has not; image tokens are replaced."""
        limit = self._num_embeddings
        if limit is None or not self._lacks_embeddings:
            return
        ids = (*row.input_ids, self._tokenizer.pad_token_id or 0)
        beyond = next((id_ for id_ in ids if id_ >= limit and id_ not in self._visual_ids), None)
        if beyond is not None:
            who, token = f"Row {row.id}" if row.id else "The prompt", self._tokenizer.convert_ids_to_tokens(beyond)
            raise DataError(
                f"{who} needs the token {token!r} with the id {beyond}, and the model's embedding has "
                f"{self._num_embeddings} rows, for the ids below. Take the tokenizer files that belong to the weights, "
                f"or make the rows and save the model again: "
                f"model.resize_token_embeddings({max(self._tokenizer.get_vocab().values()) + 1})."
            )
