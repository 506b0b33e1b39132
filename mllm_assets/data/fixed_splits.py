"""Splits that are given and not ours to choose: the original guide's shuffle, and a source that is split already.

Duplicates may then lie on both sides; `splits_share_no_image` lists them, and a release has to allow it.
"""

import numpy as np
import pyarrow as pa

from mllm_assets.data.assign import NONE, REJECTED, SPLITS, TRAIN, UNUSED, UNUSED_REASONS, VAL, Assignments
from mllm_assets.data.spec import DatasetSpec, SplitSpec
from mllm_assets.errors import DataError
from mllm_assets.quality.groups import SampleGroups


def assign_as_given(spec: DatasetSpec, samples: pa.Table, num_source_rows: int) -> Assignments:
    """Assign every accepted sample where the guide's shuffle, or the source itself, puts it.

    Args:
        spec: A spec whose `split_is_given` holds.
        samples: An assessment's rows in the source's order, rejected ones too: they keep their places.
        num_source_rows: What the guide's shuffle is over; `row_index` is a row's place among them.

    Raises:
        DataError: A side would be empty.
    """
    accepted = samples["reject_reason"].is_null().to_numpy()
    splits = np.full(len(accepted), SPLITS.index(UNUSED), np.int8)
    positions = np.full(len(accepted), NONE, np.int64)
    if spec.source.val_split is not None:
        sides = samples["source_split"].to_numpy()
        for side in (TRAIN, VAL):
            here = sides == side
            splits[here], positions[here] = SPLITS.index(side), np.arange(here.sum())
    else:
        places = guide_places(num_source_rows, spec.split)
        for number, row_index in enumerate(samples["row_index"].to_numpy().tolist()):
            if row_index in places:
                side, positions[number] = places[row_index]
                splits[number] = SPLITS.index(side)
    splits[~accepted], positions[~accepted] = SPLITS.index(REJECTED), NONE
    reasons = np.where(splits == SPLITS.index(UNUSED), UNUSED_REASONS.index("over_quota"), NONE).astype(np.int8)
    for side in (TRAIN, VAL):
        if not (splits == SPLITS.index(side)).any():
            raise DataError(
                f"Dataset {spec.name!r}: no usable sample is left for {side}, expected at least 1. See the reject "
                "reasons of sample_quality, and loosen its limits or correct the source."
            )
    return Assignments(splits, reasons, positions, _groups(samples))


def _groups(samples: pa.Table) -> SampleGroups:
    """The groups as the assessment names them."""
    named = samples["duplicate_group"].combine_chunks().dictionary_encode()
    groups = named.indices.fill_null(NONE).to_numpy().astype(np.int64)
    keys = np.array(named.dictionary.to_pylist(), "S16")
    return SampleGroups(groups, keys, np.bincount(groups[groups != NONE], minlength=len(keys)))


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
