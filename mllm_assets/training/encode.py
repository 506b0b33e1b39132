r"""Gemma 3's turn format: a ShareGPT row becomes token ids and labels exactly as LLaMA-Factory makes them.

`<bos>` once, then for each turn `<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n`; a system text
stands before the first user text with a blank line; `<image>` becomes the processor's full image sequence; nothing is
trimmed. What is supervised: each assistant answer with its `<end_of_turn>\n`, newline included. Question and answer
are tokenised apart. Source: llamafactory 0.9.5, `data/template.py` (gemma3) and `data/processor/supervised.py`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from mllm_assets.errors import DataError

if TYPE_CHECKING:
    from mllm_assets.data.sharegpt import Message, Row

IMAGE_PLACEHOLDER = "<image>"
IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRow:
    """One row's tokens: `input_ids` and `labels` are of one length, `images` in the order of their placeholders."""

    id: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    images: tuple[Path, ...] = ()
    num_tokens_cut: int = 0


class Encoder:
    """Encodes rows for one model's processor.

    Args:
        processor: A `Gemma3Processor`.
        cutoff_len: Most tokens a row may have; what is longer is cut as LLaMA-Factory cuts it.
        system: System text for rows that have none of their own.
    """

    def __init__(self, processor: Any, *, cutoff_len: int = 2048, system: str | None = None) -> None:
        self.tokenizer = processor.tokenizer
        self.cutoff_len = cutoff_len
        self.system = system
        self.image_token_id: int = processor.tokenizer.image_token_id
        self.num_image_tokens: int = processor.image_seq_length
        self._image_sequence: str = processor.full_image_sequence

    def encode(self, row: "Row") -> EncodedRow:
        """Encode all turns of a row, answers supervised.

        Raises:
            DataError: `cutoff_len` cuts into an image or leaves no supervised token, or the text itself holds image
                tokens. Names the row.
        """
        input_ids: list[int] = []
        labels: list[int] = []
        num_tokens_cut = 0
        for source, target in self._pairs(row):
            room = self.cutoff_len - len(input_ids)
            source_len, target_len = _fit(len(source), len(target), room) if room > 0 else (0, 0)
            num_tokens_cut += len(source) - source_len + len(target) - target_len
            input_ids += source[:source_len] + target[:target_len]
            labels += [IGNORE_INDEX] * source_len + target[:target_len]
        encoded = EncodedRow(
            id=row.id,
            input_ids=tuple(input_ids),
            labels=tuple(labels),
            images=tuple(row.images),
            num_tokens_cut=num_tokens_cut,
        )
        self._check_images(encoded)
        if all(label == IGNORE_INDEX for label in labels):
            raise DataError(
                f"Row {row.id} supervises no token: cutoff_len is {self.cutoff_len}, and its answers are empty or cut "
                f"off ({num_tokens_cut} tokens). Raise cutoff_len or drop the row."
            )
        return encoded

    def encode_prompt(self, row: "Row") -> EncodedRow:
        """Encode what stands before a row's last answer, up to where the model answers; all labels are -100.

        Raises:
            DataError: The text itself holds image tokens. Names the row.
        """
        pairs = self._pairs(row)
        input_ids = [token for source, target in pairs[:-1] for token in source + target] + pairs[-1][0]
        encoded = EncodedRow(
            id=row.id,
            input_ids=tuple(input_ids),
            labels=(IGNORE_INDEX,) * len(input_ids),
            images=tuple(row.images),
        )
        self._check_images(encoded)
        return encoded

    def _pairs(self, row: "Row") -> list[tuple[list[int], list[int]]]:
        """Return (question, answer) token ids per exchange; the answer of a row that ends with a question is empty."""
        messages: Sequence[Message] = row.messages
        system = self.system
        if messages and messages[0].role == "system":
            system, messages = messages[0].content, messages[1:]
        pairs = []
        for index in range(0, len(messages), 2):
            text = messages[index].content.replace(IMAGE_PLACEHOLDER, self._image_sequence)
            if index == 0 and system:
                text = f"{system}\n\n{text}"
            source = self._tokens(f"<start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n")
            if index == 0:
                source = [self.tokenizer.bos_token_id, *source]
            answer = messages[index + 1].content if index + 1 < len(messages) else None
            pairs.append((source, [] if answer is None else self._tokens(f"{answer}<end_of_turn>\n")))
        return pairs

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _check_images(self, row: EncodedRow) -> None:
        found = row.input_ids.count(self.image_token_id)
        expected = len(row.images) * self.num_image_tokens
        if found == expected:
            return
        if row.num_tokens_cut:
            raise DataError(
                f"Row {row.id} is cut inside its images: cutoff_len {self.cutoff_len} leaves {found} of {expected} "
                f"image tokens. Raise cutoff_len by at least {row.num_tokens_cut}."
            )
        raise DataError(
            f"Row {row.id} has {found} image tokens in its text, expected {expected} for its {len(row.images)} images. "
            f"Its text holds a control token of the model, such as <image_soft_token>: take it out."
        )


def _fit(source_len: int, target_len: int, room: int) -> tuple[int, int]:
    """Share `room` tokens as LLaMA-Factory's `infer_seqlen` does: the shorter half is kept whole if it can be."""
    if target_len * 2 < room:
        max_target_len = room
    elif source_len * 2 < room:
        max_target_len = room - source_len
    else:
        max_target_len = int(room * (target_len / (source_len + target_len)))
    kept_target_len = min(max_target_len, target_len)
    return min(max(room - kept_target_len, 0), source_len), kept_target_len


def load_image(path: Path, *, max_pixels: int = 768 * 768, min_pixels: int = 32 * 32, row_id: str = "") -> Image.Image:
    """Open an image as RGB with at most `max_pixels` and at least `min_pixels` pixels.

    LLaMA-Factory resizes to that area with Pillow's default filter before the processor sees the image, and the loss
    depends on it (5.9e-4 on photographs).

    Raises:
        DataError: The file is no image, or is damaged. Names the row and the file.
    """
    where = f" of row {row_id}" if row_id else ""
    try:
        with Image.open(path) as opened:
            opened.load()
            image: Image.Image = opened
            if image.width * image.height > max_pixels:
                image = _resized_to_area(image, max_pixels)
            if image.width * image.height < min_pixels:
                image = _resized_to_area(image, min_pixels)
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"The image {path}{where} does not exist. Make the dataset again, or drop the row.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"The image {path}{where} cannot be read ({type(error).__name__}: {error}). "
            f"Replace the file or drop the row."
        ) from error


def _resized_to_area(image: Image.Image, num_pixels: int) -> Image.Image:
    factor = math.sqrt(num_pixels / (image.width * image.height))
    return image.resize((max(1, int(image.width * factor)), max(1, int(image.height * factor))))


def check_image_headers(rows: Iterable[EncodedRow]) -> None:
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
