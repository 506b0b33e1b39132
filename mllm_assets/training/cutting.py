"""Which tokens of a row `cutoff_len` leaves, as LLaMA-Factory shares them out between its turns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Lengths = tuple[int, int]  # tokens of a question and of its answer


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTurns:
    """A row for the question how short it may be cut: its turns' lengths and where their last image tokens end.

    Attributes:
        lengths: Of each turn, (question, answer).
        needed: Tokens of each turn, (question, answer), up to and including the last one of an image.
        num_leading: Tokens before the first turn.
    """

    lengths: Sequence[Lengths]
    needed: Sequence[Lengths]
    num_leading: int = 0

    def fits(self, cutoff_len: int, *, last_first: bool) -> bool:
        """Whether a cut at `cutoff_len` leaves every image whole."""
        kept = kept_lengths(self.lengths, cutoff_len - self.num_leading, last_first=last_first)
        return all(k[0] >= n[0] and k[1] >= n[1] for k, n in zip(kept, self.needed, strict=True))


def kept_lengths(lengths: Sequence[Lengths], room: int, *, last_first: bool = False) -> list[Lengths]:
    """Return how many tokens of each turn stay.

    Args:
        lengths: Of each turn, (question, answer).
        room: Tokens that the row may have.
        last_first: The last turn is served first, as with `mask_history`.

    Source: llamafactory 0.9.5, `SupervisedDatasetProcessor._encode_data_example`.
    """
    kept = [(0, 0)] * len(lengths)
    for index in reversed(range(len(lengths))) if last_first else range(len(lengths)):
        if room <= 0:
            break
        kept[index] = _shared(*lengths[index], room)
        room -= sum(kept[index])
    return kept


def smallest_cutoff_len(rows: Iterable[ImageTurns], above: int, *, last_first: bool) -> int:
    """Return the least `cutoff_len` above a given one at which no row loses part of an image.

    It has to be searched: more room may take tokens from a question, once its answer fits whole.
    """
    rows = list(rows)
    candidate = above + 1
    while not all(row.fits(candidate, last_first=last_first) for row in rows):
        candidate += 1
    return candidate


def _shared(source_len: int, target_len: int, room: int) -> Lengths:
    """`infer_seqlen`: the shorter half is kept whole if it can be."""
    if target_len * 2 < room:
        max_target_len = room
    elif source_len * 2 < room:
        max_target_len = room - source_len
    else:
        max_target_len = int(room * (target_len / (source_len + target_len)))
    kept_target_len = min(max_target_len, target_len)
    return min(max(room - kept_target_len, 0), source_len), kept_target_len
