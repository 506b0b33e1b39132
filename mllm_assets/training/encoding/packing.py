"""Rows packed into sequences as LLaMA-Factory packs them."""

import bisect
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_assets.errors import RecipeError
from mllm_assets.families.family import FAMILIES, processor_family
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.encoding.encoded_rows import EncodedRows

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter


def pack(rows: EncodedRows, cutoff_len: int, *, group_size: int = 1000, num_groups: int | None = None) -> EncodedRows:
    """Return packed rows; the positions restart at each row in them.

    Args:
        rows: In the recipe's order.
        cutoff_len: Most tokens of a sequence; no row is longer.
        group_size: How many rows are packed together (`preprocessing_batch_size`).
        num_groups: LLaMA-Factory's `preprocessing_num_workers`, each of which packs a separate stretch of the rows.

    Source: llamafactory 0.9.5, `PackedSupervisedDatasetProcessor` and `greedy_knapsack`.
    """
    lengths = rows.counted("num_tokens")
    groups = groups_of(len(rows), group_size, num_groups)
    return rows.packed(knapsack for group in groups for knapsack in _knapsacks(group, lengths, cutoff_len))


def groups_of(num_rows: int, group_size: int, num_groups: int | None) -> Iterator[range]:
    """The places of rows that LLaMA-Factory hands to a function of several rows together."""
    for part in _stretches(range(num_rows), min(num_groups or 1, max(num_rows, 1))):
        yield from (part[at : at + group_size] for at in range(0, len(part), group_size))


def _stretches(places: range, count: int) -> Iterator[range]:
    """`Dataset.shard(contiguous=True)`: the first ones are longer by one."""
    size, rest = divmod(len(places), count)
    for index in range(count):
        start = size * index + min(index, rest)
        yield places[start : start + size + (index < rest)]


def _knapsacks(places: range, lengths: np.ndarray, capacity: int) -> Iterator[list[int]]:
    """The longest row that still fits comes next; of equally long rows the last."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for place in places:
        by_length[int(lengths[place])].append(place)
    left = sorted(int(lengths[place]) for place in places)
    assert left[-1] <= capacity, "the encoder cuts rows to the capacity"
    while left:
        knapsack, room = [], capacity
        while index := bisect.bisect(left, room):
            length = left.pop(index - 1)
            knapsack.append(by_length[length].pop())
            room -= length
        yield knapsack


def check_packing(spec: TrainSpec, processor: Any, reporter: "Reporter") -> None:
    """Refuse packing for a model whose rows cannot be packed so, and say what it means otherwise.

    Raises:
        RecipeError: Names the families whose rows are packed, or the key that keeps rows apart.
    """
    family = processor_family(processor)
    if family.packed_masks is None:
        known = ", ".join(other.name for other in FAMILIES.values() if other.packed_masks)
        raise RecipeError(
            f"packing is only done for {known}, and the model is {family.name}, whose rows cannot be kept apart "
            "in one sequence. Delete packing and neat_packing."
        )
    if family.packed_positions is not None and not spec.neat_packing:
        raise RecipeError(
            f"packing is set, and the positions of pictures in {family.name} are made for rows that are kept apart. "
            "Set neat_packing: true, or delete packing."
        )
    if spec.neat_packing:
        fails = " LLaMA-Factory 0.9.5 fails with it on Gemma 3." if family.model_type == "gemma3" else ""
        reporter.warn(f"neat_packing: packed rows do not see each other.{fails}")
    else:
        reporter.warn(
            "packing: a row sees the rows packed in front of it, as in LLaMA-Factory. "
            "neat_packing: true keeps them apart."
        )
