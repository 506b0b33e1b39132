"""`EncodedRow`: one row as the model reads it."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TypeAlias

IGNORE_INDEX = -100
Tokens: TypeAlias = "array[int]"


def no_tokens() -> Tokens:
    """The tokens of nothing."""
    return array("i")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRow:
    """One row's tokens: `input_ids` and `labels` are of one length, `images` in the order of their placeholders.

    Tokens are held as C's int, 4 bytes each, where a tuple of Python's numbers takes up to ten times that.
    `grids_thw` has the images' patches in time, height and width, for models that need them; `num_patches` is how many
    the tower sees of all images, None if it is the same for every image; `num_crops` are the parts of images that it
    sees beside them; `positions` restart at each row of a packed
    sequence, and are empty if rows are not packed. Of a pair the row is the preferred answer, and `other` the same
    question with the rejected one. An answer with a `mark`, good or bad, has as `other` its question with the answer of
    another row. `reference` are both answers' log-probabilities in the model that the run starts from.
    `videos` have patches of their own, `video_grids_thw`, whose steps in time last `seconds_per_grid`.
    `text` is what the model's chat template wrote, where its processor makes the batches (`rendered.py`).
    """

    id: str
    input_ids: Tokens
    labels: Tokens
    images: tuple[Path, ...] = ()
    num_tokens_cut: int = 0
    grids_thw: tuple[tuple[int, int, int], ...] = ()
    num_patches: int | None = None
    num_crops: int = 0
    positions: Tokens = field(default_factory=no_tokens)
    other: "EncodedRow | None" = None
    mark: bool | None = None
    reference: tuple[float, float] | None = None
    text: str = ""
    videos: tuple[Path, ...] = ()
    video_grids_thw: tuple[tuple[int, int, int], ...] = ()
    seconds_per_grid: tuple[float, ...] = ()

    @classmethod
    def of_picture(cls, path: Path, row_id: str) -> "EncodedRow":
        """A picture of a row alone, for the tower."""
        return cls(id=row_id, input_ids=no_tokens(), labels=no_tokens(), images=(path,))

    @classmethod
    def of_video(cls, path: Path, row_id: str, grid_thw: tuple[int, int, int]) -> "EncodedRow":
        """A video of a row alone, for the tower."""
        tokens = no_tokens()
        return cls(id=row_id, input_ids=tokens, labels=tokens, videos=(path,), video_grids_thw=(grid_thw,))

    @property
    def num_supervised(self) -> int:
        """How many of its tokens are learnt."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    @property
    def sequences(self) -> tuple["EncodedRow", ...]:
        """What the model reads of it."""
        return (self,) if self.other is None else (replace(self, other=None), self.other)


def joined(rows: Sequence[EncodedRow]) -> EncodedRow:
    """Rows one after another in one sequence, in which the positions restart at each."""
    return EncodedRow(
        id=", ".join(row.id for row in rows),
        input_ids=array("i", chain.from_iterable(row.input_ids for row in rows)),
        labels=array("i", chain.from_iterable(row.labels for row in rows)),
        images=tuple(chain.from_iterable(row.images for row in rows)),
        num_tokens_cut=sum(row.num_tokens_cut for row in rows),
        num_crops=sum(row.num_crops for row in rows),
        positions=array("i", chain.from_iterable(range(len(row.input_ids)) for row in rows)),
    )
