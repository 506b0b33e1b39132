"""Several short rows in one sequence of `cutoff_len` tokens, grouped as LLaMA-Factory groups them.

With `packing` a token attends to everything before it, the rows in front included, as in LLaMA-Factory. With
`neat_packing` rows do not see each other: the loss is that of the same rows apart. (LLaMA-Factory 0.9.5 fails with
`neat_packing` on Gemma 3, because its mask of four dimensions meets code for one of two.)
"""

import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain

from mllm_assets.training.encode import EncodedRow


def pack(
    rows: Sequence[EncodedRow], cutoff_len: int, *, group_size: int = 1000, num_groups: int | None = None
) -> list[EncodedRow]:
    """Return packed rows, whose positions begin again with each row in them.

    Args:
        rows: In the recipe's order.
        cutoff_len: Most tokens of a sequence; no row is longer.
        group_size: Rows of one group are packed together (`preprocessing_batch_size`).
        num_groups: LLaMA-Factory's `preprocessing_num_workers`, each of which packs a stretch of the rows by itself.

    Source: llamafactory 0.9.5, `PackedSupervisedDatasetProcessor` and `greedy_knapsack`.
    """
    stretches = _stretches(rows, min(num_groups or 1, max(len(rows), 1)))
    groups = [part[at : at + group_size] for part in stretches for at in range(0, len(part), group_size)]
    return [_joined(knapsack) for group in groups for knapsack in _knapsacks(group, cutoff_len)]


def _stretches(rows: Sequence[EncodedRow], count: int) -> Iterator[Sequence[EncodedRow]]:
    """`Dataset.shard(contiguous=True)`: the first ones are longer by one."""
    size, rest = divmod(len(rows), count)
    for index in range(count):
        start = size * index + min(index, rest)
        yield rows[start : start + size + (index < rest)]


def _knapsacks(rows: Sequence[EncodedRow], capacity: int) -> Iterator[list[EncodedRow]]:
    """The longest row that still fits comes next; of rows of one length the last."""
    by_length: dict[int, list[EncodedRow]] = defaultdict(list)
    for row in rows:
        by_length[len(row.input_ids)].append(row)
    lengths = sorted(len(row.input_ids) for row in rows)
    assert lengths[-1] <= capacity, "the encoder cuts rows to the capacity"
    while lengths:
        knapsack, room = [], capacity
        while index := bisect.bisect(lengths, room):
            length = lengths.pop(index - 1)
            knapsack.append(by_length[length].pop())
            room -= length
        yield knapsack


def _joined(rows: Sequence[EncodedRow]) -> EncodedRow:
    return EncodedRow(
        id=", ".join(row.id for row in rows),
        input_ids=tuple(chain.from_iterable(row.input_ids for row in rows)),
        labels=tuple(chain.from_iterable(row.labels for row in rows)),
        images=tuple(chain.from_iterable(row.images for row in rows)),
        num_tokens_cut=sum(row.num_tokens_cut for row in rows),
        positions=tuple(chain.from_iterable(range(len(row.input_ids)) for row in rows)),
    )
