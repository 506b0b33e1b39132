"""Splits: exact sizes, no group on both sides, nothing moves across."""

import hashlib
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mllm_assets.data.curate import assign as arrays
from mllm_assets.data.curate.assign import NONE, SPLITS, UNUSED_REASONS
from mllm_assets.data.ingest.split_spec import SIDES, SplitSpec
from mllm_assets.data.quality.groups import SampleGroups
from mllm_assets.errors import DataError

# pairs of looks that are alike, among those it is asked for
Near = Callable[[Collection[str]], Sequence[tuple[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    sample_id: str
    image_id: str
    look: str


@dataclass(frozen=True, kw_only=True)
class Assignment:
    sample_id: str
    split: str
    group: str | None
    reason: str | None
    position: int


def assign(
    candidates: Sequence[Candidate], near: Near, spec: SplitSpec, history: Mapping[str, str]
) -> list[Assignment]:
    """`data.curate.assign.assign` by names instead of arrays."""

    def regroup(chosen_S: NDArray[np.bool_]) -> SampleGroups:
        chosen = [c for c, wanted in zip(candidates, chosen_S.tolist(), strict=True) if wanted]
        hashes = sorted({c.look for c in chosen})
        index = {look: number for number, look in enumerate(hashes)}
        ends = np.array([[index[look] for look in pair] for pair in near(hashes)], int).reshape(-1, 2)
        graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(hashes), len(hashes)))
        number, of_look = connected_components(graph, directed=False)
        groups = np.full(len(candidates), NONE, np.int64)
        groups[chosen_S] = [of_look[index[c.look]] for c in chosen]
        members: list[list[str]] = [[] for _ in range(number)]
        for c in chosen:
            members[of_look[index[c.look]]].append(c.image_id)
        keys = np.array([min(ids)[:16] for ids in members], "S16")
        return SampleGroups(groups, keys, np.bincount(groups[chosen_S], minlength=number))

    sample_ids = [c.sample_id for c in candidates]
    sides = np.array([SPLITS.index(history[key]) if key in history else NONE for key in sample_ids], np.int8)
    found = arrays.assign(np.array(sample_ids, "S"), np.ones(len(sample_ids), bool), regroup, spec, sides)
    columns = (found.splits_S.tolist(), found.reasons_S.tolist(), found.positions_S.tolist())
    return [
        Assignment(
            sample_id=key,
            split=SPLITS[split],
            group=found.groups.keys(number, number + 1)[0],
            reason=None if reason == NONE else UNUSED_REASONS[reason],
            position=position,
        )
        for number, (key, split, reason, position) in enumerate(zip(sample_ids, *columns, strict=True))
    ]


def candidate(name: str, look: str | None = None) -> Candidate:
    image_id = hashlib.sha256(name.encode()).hexdigest()
    return Candidate(sample_id=image_id[:16], image_id=image_id, look=look or name)


def near(*pairs: tuple[str, str]) -> Near:
    """What connects looks, from pairs given by hand."""
    return lambda hashes: [pair for pair in pairs if set(pair) <= set(hashes)]


def candidates(count: int) -> list[Candidate]:
    return [candidate(f"picture {number}") for number in range(count)]


def sides(assignments: list[Assignment]) -> dict[str, str]:
    return {a.sample_id: a.split for a in assignments}


def used(assignments: list[Assignment]) -> dict[str, str]:
    return {a.sample_id: a.split for a in assignments if a.split in SIDES}


def count(assignments: list[Assignment], split: str) -> int:
    return sum(a.split == split for a in assignments)


def crossed(old: dict[str, str], new: dict[str, str]) -> list[str]:
    return [key for key in old if old[key] != new[key] and {old[key], new[key]} <= set(SIDES)]


def test_sizes_are_exact_where_there_are_samples_enough() -> None:
    result = assign(candidates(800), near(), SplitSpec(num_train=680, num_val=120), {})
    assert (count(result, "train"), count(result, "val")) == (680, 120)
    result = assign(candidates(1221), near(), SplitSpec(num_train=500, num_val=50), {})
    assert [count(result, side) for side in ("train", "val", "test", "unused")] == [500, 50, 50, 621]
    assert {a.reason for a in result if a.split == "unused"} == {"over_quota"}


def test_too_few_samples_shrink_both_sizes_in_proportion_train_rounded_down() -> None:
    result = assign(candidates(101), near(), SplitSpec(num_train=500, num_val=50), {})
    assert (count(result, "train"), count(result, "val")) == (91, 10)


def test_one_sample_cannot_be_split() -> None:
    with pytest.raises(DataError, match="Only 1 usable samples are left, but a split needs at least 2"):
        assign(candidates(1), near(), SplitSpec(), {})


@pytest.mark.parametrize(
    ("num_rows", "num_test", "expected"),
    [
        (600, None, [500, 50, 50]),
        (585, None, [500, 50, 35]),  # what the other two leave
        (569, None, [500, 50, 0]),  # 19 samples would judge nothing
        (300, None, [272, 28, 0]),
        (10_000, 0, [500, 50, 0]),
        (600, 7, [500, 50, 7]),
        (330, 110, [250, 25, 55]),  # asked for: all three in proportion
        (2, 50, [1, 1, 0]),
    ],
)
def test_the_size_of_the_test_split(num_rows: int, num_test: int | None, expected: list[int]) -> None:
    result = assign(candidates(num_rows), near(), SplitSpec(num_test=num_test), {})
    assert [count(result, side) for side in SIDES] == expected


def test_a_test_split_by_default_moves_nothing_of_a_dataset_that_was_split_before_there_was_one() -> None:
    spec = SplitSpec(num_train=40, num_val=25)
    before = used(assign(candidates(66), near(), replace(spec, num_test=0), {}))
    same = assign(candidates(66), near(), spec, before)
    assert (used(same), count(same, "test")) == (before, 0)
    grown = assign(candidates(90), near(), spec, before)
    assert crossed(before, sides(grown)) == []
    assert [count(grown, side) for side in SIDES] == [40, 25, 25]
    again = assign(candidates(120), near(), spec, used(grown))
    assert crossed(used(grown), sides(again)) == []


def test_what_trained_before_is_not_tested_on_even_if_nothing_else_is_left() -> None:
    before = used(assign(candidates(60), near(), SplitSpec(num_train=50, num_val=10, num_test=0), {}))
    result = assign(candidates(60), near(), SplitSpec(num_train=40, num_val=10, num_test=10), before)
    assert count(result, "test") == 0
    assert crossed(before, sides(result)) == []


def test_a_split_has_its_samples_in_the_order_of_the_source() -> None:
    """They were in the order of a hash, and nobody found a row again where it had been."""
    pool = [candidate(f"group {n % 40} picture {n}", f"look {n}") for n in range(120)]
    pairs = [(f"look {n}", f"look {n + 40}") for n in range(80)]
    result = assign(pool, near(*pairs), SplitSpec(num_train=71, num_val=20, num_test=20), {})
    for side, num_samples in zip(SIDES, (71, 20, 20), strict=True):
        assert [a.position for a in result if a.split == side] == list(range(num_samples))


def test_the_side_of_a_sample_does_not_hang_on_the_order_of_the_source() -> None:
    pool = candidates(60)
    shuffled = random.Random(1).sample(pool, len(pool))
    spec = SplitSpec(num_train=30, num_val=10)
    assert sides(assign(pool, near(), spec, {})) == sides(assign(shuffled, near(), spec, {}))


def test_another_seed_is_another_split() -> None:
    pool = candidates(100)
    first = sides(assign(pool, near(), SplitSpec(num_train=50, num_val=50, seed=1), {}))
    assert first != sides(assign(pool, near(), SplitSpec(num_train=50, num_val=50, seed=2), {}))


def test_added_samples_move_no_old_sample_across_without_any_history() -> None:
    """With samples to spare the two ends of the hash order never meet, so a lost database moves nothing either."""
    spec = SplitSpec(num_train=100, num_val=20)
    old = sides(assign(candidates(150), near(), spec, {}))
    assert crossed(old, sides(assign(candidates(400), near(), spec, {}))) == []


def test_added_samples_move_no_old_sample_across_while_the_sizes_still_grow() -> None:
    """Here the boundary is in use: without history, samples beside it would change sides."""
    moved_without_history = 0
    for seed in range(10):
        spec = SplitSpec(num_train=500, num_val=100, seed=seed)
        old = assign(candidates(300), near(), spec, {})
        moved_without_history += len(crossed(sides(old), sides(assign(candidates(450), near(), spec, {}))))
        new = assign(candidates(450), near(), spec, used(old))
        assert crossed(sides(old), sides(new)) == []
        assert count(new, "train") + count(new, "val") == 450
    assert moved_without_history > 0


def test_a_group_stays_on_one_side() -> None:
    pool = [candidate(f"group {n // 3} picture {n}", f"look {n}") for n in range(300)]
    pairs = [(f"look {n}", f"look {n + 1}") for n in range(300) if n % 3 != 2]
    result = assign(pool, near(*pairs), SplitSpec(num_train=200, num_val=50), {})
    by_group: dict[str | None, set[str]] = {}
    for assignment in result:
        by_group.setdefault(assignment.group, set()).add(assignment.split)
    assert len(by_group) == 100
    assert not [group for group, found in by_group.items() if len(found & set(SIDES)) > 1]
    assert (count(result, "train"), count(result, "val")) == (200, 50)


def test_a_repeat_of_the_same_sample_is_unused_as_a_duplicate() -> None:
    first = candidate("one")
    repeat = Candidate(sample_id=f"{first.sample_id}-2", image_id=first.image_id, look=first.look)
    result = assign([first, repeat, *candidates(10)], near(), SplitSpec(num_train=8, num_val=2), {})
    assert {a.sample_id: a.reason for a in result}[repeat.sample_id] == "sample_duplicate"


def test_a_new_picture_between_an_old_train_and_an_old_val_sample_is_left_out() -> None:
    """Joining the two groups would put one of the old samples on the other side."""
    pool = candidates(10)
    spec = SplitSpec(num_train=8, num_val=2)
    old = sides(assign(pool, near(), spec, {}))
    train = next(c for c in pool if old[c.sample_id] == "train")
    val = next(c for c in pool if old[c.sample_id] == "val")
    bridge = candidate("bridge")
    pairs = [(train.look, "bridge"), (val.look, "bridge")]
    new = assign([*pool, bridge], near(*pairs), spec, old)
    assert {a.sample_id: a.reason for a in new}[bridge.sample_id] == "image_bridges_splits"
    assert {key: side for key, side in sides(new).items() if key != bridge.sample_id} == old


def test_old_samples_that_now_count_as_duplicates_leave_validation() -> None:
    """A wider duplicate distance can join an old train and an old val sample directly."""
    pool = candidates(10)
    spec = SplitSpec(num_train=8, num_val=2)
    old = sides(assign(pool, near(), spec, {}))
    train = next(c for c in pool if old[c.sample_id] == "train")
    val = next(c for c in pool if old[c.sample_id] == "val")
    new = assign(pool, near((train.look, val.look)), spec, old)
    assert {a.sample_id: (a.split, a.reason) for a in new}[val.sample_id] == ("unused", "image_bridges_splits")
    assert sides(new)[train.sample_id] == "train"


def test_a_corrected_caption_does_not_move_its_picture_across() -> None:
    """Sample ids cover the texts; the side hangs on the picture."""
    pool = candidates(100)
    spec = SplitSpec(num_train=80, num_val=20)
    corrected = [Candidate(sample_id=f"{n:016x}", image_id=c.image_id, look=c.look) for n, c in enumerate(pool)]
    old, new = sides(assign(pool, near(), spec, {})), sides(assign(corrected, near(), spec, {}))
    assert list(old.values()) == list(new.values())


def test_a_bridge_that_is_left_out_does_not_hide_what_it_stood_between() -> None:
    """The old pair was connected through the new picture; without it the two must still be found to be alike."""
    pool = candidates(12)
    spec = SplitSpec(num_train=6, num_val=4)
    old = sides(assign(pool, near(), spec, {}))
    trains = [c for c in pool if old[c.sample_id] == "train"]
    val = next(c for c in pool if old[c.sample_id] == "val")
    bridge = candidate("bridge")

    def forest(hashes: Collection[str]) -> list[tuple[str, str]]:
        """As few pairs as connect: a star around the bridge where it is there, otherwise around the first."""
        close = sorted({trains[0].look, trains[1].look, val.look, "bridge"} & set(hashes))
        centre = "bridge" if "bridge" in close else close[0] if close else ""
        return [(centre, look) for look in close if look != centre]

    new = {a.sample_id: (a.split, a.reason) for a in assign([*pool, bridge], forest, spec, old)}
    assert new[bridge.sample_id] == ("unused", "image_bridges_splits")
    assert new[val.sample_id] == ("unused", "image_bridges_splits"), "it looks like two training pictures itself"
    assert [new[c.sample_id][0] for c in trains] == ["train"] * len(trains)
