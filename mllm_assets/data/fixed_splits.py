"""Splits that are given and not ours to choose: the original guide's shuffle, and a source that is split already.

Duplicates may then lie on both sides; `splits_share_no_image` lists them, and a release has to allow it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm_assets.data.assign import TRAIN, UNUSED, VAL, Assignment
from mllm_assets.data.spec import DatasetSpec, SplitSpec
from mllm_assets.errors import DataError


def assign_as_given(spec: DatasetSpec, verdicts: Sequence[Mapping[str, Any]], num_source_rows: int) -> list[Assignment]:
    """Assign every accepted sample where the guide's shuffle, or the source itself, puts it.

    Args:
        spec: A spec whose `split_is_given` holds.
        verdicts: All ingested rows in the source's order, rejected ones too: they keep their places in the shuffle.
        num_source_rows: What the guide's shuffle is over; `row_index` is a row's place among them.

    Raises:
        DataError: A side would be empty.
    """
    given = spec.source.val_split is not None
    places = _places_by_source(verdicts) if given else guide_places(num_source_rows, spec.split)
    assignments = []
    for verdict in verdicts:
        if verdict["reject_reason"] is not None:
            continue
        side, position = places.get(verdict["row_index"], (UNUSED, None))
        reason = "over_quota" if position is None else None
        assignments.append(
            Assignment(
                sample_id=verdict["sample_id"],
                split=side,
                group=verdict["duplicate_group"],
                reason=reason,
                position=position,
            )
        )
    found = Counter(assignment.split for assignment in assignments)
    for side in (TRAIN, VAL):
        if not found[side]:
            raise DataError(
                f"Dataset {spec.name!r}: no usable sample is left for {side}, expected at least 1. See the reject "
                "reasons of sample_quality, and loosen its limits or correct the source."
            )
    return assignments


def guide_places(num_rows: int, spec: SplitSpec) -> dict[int, tuple[str, int]]:
    """Row of the source -> side and place in it: a seeded shuffle, the first samples train, the next validate.

    Source:
        `datasets.Dataset.shuffle(seed)` takes the rows at `numpy.random.default_rng(seed).permutation(num_rows)`.
    """
    num_train, num_val = spec.num_train, spec.num_val
    if num_rows < num_train + num_val:
        num_train = num_rows * num_train // (num_train + num_val)
        num_val = num_rows - num_train
    order = np.random.default_rng(spec.seed).permutation(num_rows)
    train = {int(row): (TRAIN, place) for place, row in enumerate(order[:num_train])}
    return train | {int(row): (VAL, place) for place, row in enumerate(order[num_train : num_train + num_val])}


def _places_by_source(verdicts: Sequence[Mapping[str, Any]]) -> dict[int, tuple[str, int]]:
    taken: Counter[str] = Counter()
    places = {}
    for verdict in verdicts:
        side = verdict["source_split"]
        places[verdict["row_index"]] = (side, taken[side])
        taken[side] += 1
    return places
