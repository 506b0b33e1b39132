"""Decide which samples train and which validate: a pure function, stable when samples are added.

Every duplicate group has a place in 0..1, the hash of the seed and of its smallest image digest. Validation is
filled from the low end, training from the high end, so a new group can push an old one out of use but, as long as
there are samples to spare, never across. Where a set is used up to the last sample, or a new image joins two old
groups, `history` decides: a sample that trained or validated before keeps its side.

Samples are places in arrays: S samples in the order of the source, rejected ones too, G groups.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mllm_assets.data.spec import SplitSpec
from mllm_assets.errors import DataError
from mllm_assets.quality.groups import SampleGroups

TRAIN = "train"
VAL = "val"
UNUSED = "unused"
REJECTED = "rejected"
# what `Assignments.splits_S` and `reasons_S` number
SPLITS = (TRAIN, VAL, UNUSED, REJECTED)
UNUSED_REASONS = ("over_quota", "sample_duplicate", "image_bridges_splits")
NONE = -1

# The groups of some samples, by nothing but these
Regroup = Callable[[NDArray[np.bool_]], SampleGroups]


@dataclass(frozen=True, slots=True)
class Assignments:
    """Where each sample goes.

    Attributes:
        splits_S: A number in `SPLITS`.
        reasons_S: A number in `UNUSED_REASONS` of an unused sample, otherwise -1.
        positions_S: The place in its split, from 0; -1 of a sample in none.
        groups: The duplicate group of each accepted sample.
    """

    splits_S: NDArray[np.int8]
    reasons_S: NDArray[np.int8]
    positions_S: NDArray[np.int64]
    groups: SampleGroups

    def of(self, split: str) -> NDArray[np.bool_]:
        """Which samples are in a split."""
        return self.splits_S == SPLITS.index(split)


def assign(
    sample_ids_S: NDArray[np.bytes_],
    accepted_S: NDArray[np.bool_],
    regroup: Regroup,
    spec: SplitSpec,
    history_S: NDArray[np.int8],
) -> Assignments:
    """Assign every accepted sample to train, val or unused.

    Args:
        sample_ids_S: Ids, ASCII.
        accepted_S: Whether each sample can be used.
        regroup: Finds the groups among some samples.
        spec: Sizes asked for and the seed.
        history_S: The side of samples that trained or validated under the same `spec` before, 0 or 1, otherwise -1.

    Returns:
        No group on both sides. Fewer samples than asked for shrink both sizes in proportion, the training size
        rounded down.

    Raises:
        DataError: Fewer than two usable samples.
    """
    # a repeat of the same images and texts, see `sources.sample_content_id`
    repeats = accepted_S & (np.char.find(sample_ids_S, b"-") >= 0)
    remaining = accepted_S & ~repeats
    groups = all_groups = regroup(accepted_S)
    bridging = _bridging(remaining, groups, regroup, history_S)
    if bridging.any():
        remaining &= ~bridging
        groups = regroup(remaining)
    num_train, num_val = _sizes(int(remaining.sum()), spec)

    members = _Members(groups.groups_S, remaining, sample_ids_S)
    by_place = members.groups[np.argsort(_hashes(spec.seed, "group", groups.keys_G[members.groups]))]
    pins_G = np.full(len(groups.keys_G), NONE, np.int8)
    pinned = remaining & (history_S != NONE)
    pins_G[groups.groups_S[pinned]] = history_S[pinned]
    train_pin, val_pin = SPLITS.index(TRAIN), SPLITS.index(VAL)
    pins = pins_G[by_place]
    val = members.fill(np.concatenate([by_place[pins == val_pin], by_place[pins == NONE]]), num_val)
    pins_G[groups.groups_S[val]] = val_pin
    by_place, pins = by_place[::-1], pins_G[by_place[::-1]]
    train = members.fill(np.concatenate([by_place[pins == train_pin], by_place[pins == NONE]]), num_train)

    splits = np.where(accepted_S, SPLITS.index(UNUSED), SPLITS.index(REJECTED)).astype(np.int8)
    reasons = np.where(accepted_S, UNUSED_REASONS.index("over_quota"), NONE).astype(np.int8)
    reasons[repeats] = UNUSED_REASONS.index("sample_duplicate")
    reasons[bridging] = UNUSED_REASONS.index("image_bridges_splits")
    positions = np.full(len(sample_ids_S), NONE, np.int64)
    for number, side in ((train_pin, train), (val_pin, val)):
        splits[side], reasons[side] = number, NONE
        positions[side[np.argsort(_hashes(spec.seed, "order", sample_ids_S[side]))]] = np.arange(len(side))
    return Assignments(splits, reasons, positions, all_groups)


def _hashes(seed: int, purpose: str, keys: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
    """What to sort by: as good as random, the same for a key whatever others there are."""
    prefix = f"{seed} {purpose} ".encode()
    return np.fromiter((hashlib.sha256(prefix + key).digest() for key in keys), "S32", count=len(keys))


def _bridging(
    remaining_S: NDArray[np.bool_], groups: SampleGroups, regroup: Regroup, history_S: NDArray[np.int8]
) -> NDArray[np.bool_]:
    """Samples to leave out so that no group holds old samples of both sides: new ones first, then old val ones."""
    affected = remaining_S & _in_torn_group(remaining_S, groups, history_S)
    if not affected.any():
        return affected
    old = affected & (history_S != NONE)
    still_torn = old & _in_torn_group(old, regroup(old), history_S)
    return (affected & ~old) | (still_torn & (history_S == SPLITS.index(VAL)))


def _in_torn_group(some_S: NDArray[np.bool_], groups: SampleGroups, history_S: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Samples whose group holds some of both sides."""
    torn = np.ones(len(groups.keys_G), bool)
    for side in (TRAIN, VAL):
        found = np.zeros(len(torn), bool)
        found[groups.groups_S[some_S & (history_S == SPLITS.index(side))]] = True
        torn &= found
    inside = np.zeros(len(some_S), bool)
    inside[some_S] = torn[groups.groups_S[some_S]]
    return inside


def _sizes(num_available: int, spec: SplitSpec) -> tuple[int, int]:
    if num_available < 2:
        raise DataError(
            f"Only {num_available} usable samples are left, but a split needs at least 2. See the reject reasons of "
            "sample_quality, and loosen its limits or give the source more rows."
        )
    asked = spec.num_train + spec.num_val
    if num_available >= asked:
        return spec.num_train, spec.num_val
    num_train = min(max(num_available * spec.num_train // asked, 1), num_available - 1)
    return num_train, num_available - num_train


class _Members:
    """The samples of each group, of those that remain."""

    def __init__(
        self, groups_S: NDArray[np.int64], remaining_S: NDArray[np.bool_], sample_ids_S: NDArray[np.bytes_]
    ) -> None:
        samples = np.flatnonzero(remaining_S)
        self._samples = samples[np.argsort(groups_S[samples], kind="stable")]
        self.groups, starts = np.unique(groups_S[self._samples], return_index=True)
        num_groups = int(self.groups.max(initial=-1)) + 1
        self._starts, self._counts = np.zeros(num_groups, np.int64), np.zeros(num_groups, np.int64)
        self._starts[self.groups] = starts
        self._counts[self.groups] = np.diff(np.append(starts, len(samples)))
        self._sample_ids = sample_ids_S

    def fill(self, groups: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Take whole groups while they fit, then a part of the first that did not; a part leaves the rest unused."""
        taken = np.zeros(len(self._sample_ids), bool)
        too_large: list[int] = []
        left = size
        for group, num_members in zip(groups.tolist(), self._counts[groups].tolist(), strict=True):
            if num_members <= left:
                taken[self._of(group)] = True
                left -= num_members
            else:
                too_large.append(group)
            if not left:
                break
        for group in too_large:
            members = self._of(group)
            part = members[np.argsort(self._sample_ids[members], kind="stable")][:left]
            taken[part] = True
            left -= len(part)
        return np.flatnonzero(taken)

    def _of(self, group: int) -> NDArray[np.int64]:
        return self._samples[self._starts[group] : self._starts[group] + self._counts[group]]
