"""Decide which samples train and which validate: a pure function, stable when samples are added.

Every duplicate group has a place in 0..1, the hash of the seed and of its smallest image digest. Validation is
filled from the low end, training from the high end, so a new group can push an old one out of use but, as long as
there are samples to spare, never across. Where a set is used up to the last sample, or a new image joins two old
groups, `history` decides: a sample that trained or validated before keeps its side.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mllm_assets.data.spec import SplitSpec
from mllm_assets.errors import DataError
from mllm_assets.quality.duplicates import Pair, group_keys, group_samples

TRAIN = "train"
VAL = "val"
UNUSED = "unused"
REJECTED = "rejected"


# Near-duplicate pairs that connect the looks it is asked for, by nothing but these looks
Near = Callable[[Collection[str]], Iterable[Pair]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """An accepted sample: the digests of its images and what they look like."""

    sample_id: str
    image_ids: tuple[str, ...]
    looks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """Where a sample goes. `position` orders a split; `reason` says why a sample is unused."""

    sample_id: str
    split: str
    group: str
    reason: str | None = None
    position: int | None = None


def assign(
    candidates: Sequence[Candidate], near: Near, spec: SplitSpec, history: Mapping[str, str]
) -> list[Assignment]:
    """Assign every candidate to train, val or unused.

    Args:
        candidates: All accepted samples of the dataset.
        near: Finds what looks alike among some looks.
        spec: Sizes asked for and the seed.
        history: The side of samples that trained or validated under the same `spec` before.

    Returns:
        One assignment a candidate, no group on both sides. Fewer candidates than asked for shrink both sizes in
        proportion, the training size rounded down.

    Raises:
        DataError: Fewer than two usable samples.
    """
    unused: dict[str, str] = {}
    remaining = {c.sample_id: c for c in candidates}
    for sample_id in list(remaining):
        if "-" in sample_id:  # a repeat of the same images and texts, see `sources.sample_content_id`
            unused[sample_id] = "sample_duplicate"
            del remaining[sample_id]
    groups = all_groups = _grouped({c.sample_id: c for c in candidates}, near)
    if bridging := _bridging(remaining, groups, near, history):
        unused |= dict.fromkeys(bridging, "image_bridges_splits")
        remaining = {key: c for key, c in remaining.items() if key not in bridging}
        groups = _grouped(remaining, near)
    groups = {key: groups[key] for key in remaining}
    num_train, num_val = _sizes(len(remaining), spec)

    members: dict[str, list[str]] = defaultdict(list)
    for sample_id, group in groups.items():
        members[group].append(sample_id)
    places = {group: _hash(spec.seed, "group", group) for group in members}
    pins = {group: side for sample_id, group in groups.items() if (side := history.get(sample_id))}
    by_place = sorted(members, key=lambda group: places[group])
    val = _fill([g for g in by_place if pins.get(g) == VAL], [g for g in by_place if g not in pins], members, num_val)
    free = [g for g in reversed(by_place) if g not in pins and not val.keys() & set(members[g])]
    train = _fill([g for g in reversed(by_place) if pins.get(g) == TRAIN], free, members, num_train)

    positions: dict[str, int] = {}
    for side in (train, val):
        ordered = sorted(side, key=lambda sample_id: _hash(spec.seed, "order", sample_id))
        positions |= {sample_id: index for index, sample_id in enumerate(ordered)}
    return [
        Assignment(
            sample_id=c.sample_id,
            split=TRAIN if c.sample_id in train else VAL if c.sample_id in val else UNUSED,
            group=all_groups[c.sample_id],
            reason=None if c.sample_id in positions else unused.get(c.sample_id, "over_quota"),
            position=positions.get(c.sample_id),
        )
        for c in candidates
    ]


def _hash(seed: int, purpose: str, key: str) -> str:
    return hashlib.sha256(f"{seed} {purpose} {key}".encode()).hexdigest()


def _grouped(candidates: Mapping[str, Candidate], near: Near) -> dict[str, str]:
    pairs = near({look for c in candidates.values() for look in c.looks})
    groups = group_samples({key: c.looks for key, c in candidates.items()}, pairs)
    return group_keys(groups, {key: c.image_ids for key, c in candidates.items()})


def _bridging(
    candidates: Mapping[str, Candidate], groups: Mapping[str, str], near: Near, history: Mapping[str, str]
) -> set[str]:
    """Samples to leave out so that no group holds old samples of both sides: new ones first, then old val ones."""
    torn = _torn_groups({key: groups[key] for key in candidates}, history)
    if not torn:
        return set()
    affected = [key for key in candidates if groups[key] in torn]
    left_out = {key for key in affected if key not in history}
    regrouped = _grouped({key: candidates[key] for key in affected if key in history}, near)
    still_torn = _torn_groups(regrouped, history)
    return left_out | {key for key, group in regrouped.items() if group in still_torn and history[key] == VAL}


def _torn_groups(groups: Mapping[str, str], history: Mapping[str, str]) -> set[str]:
    sides: dict[str, set[str]] = defaultdict(set)
    for sample_id, group in groups.items():
        if sample_id in history:
            sides[group].add(history[sample_id])
    return {group for group, found in sides.items() if len(found) > 1}


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


def _fill(
    pinned: Sequence[str], free: Sequence[str], members: Mapping[str, Sequence[str]], size: int
) -> dict[str, None]:
    """Take whole groups while they fit, then a part of the first that did not; a part leaves the rest unused."""
    taken: dict[str, None] = {}
    too_large: list[str] = []
    for group in (*pinned, *free):
        if len(taken) + len(members[group]) <= size:
            taken |= dict.fromkeys(members[group])
        else:
            too_large.append(group)
        if len(taken) == size:
            return taken
    for group in too_large:
        taken |= dict.fromkeys(sorted(members[group])[: size - len(taken)])
    return taken
