"""Decide which samples train, validate and test: a pure function, stable when samples are added.

Every duplicate group has a position in 0..1, the hash of the seed and of its smallest image digest. Validation is
filled from the low end, training from the high end, test outwards from a point between them that is free even where
all samples are used, so a new group can push an old one out of use but, as long as there are samples to spare, never
across. If a set is used up to the last sample, or a new image joins two old groups, `history` decides: a sample that
was on a side before keeps it. What trained or validated is never tested on, not even where nothing else is left.

Samples are indices of arrays: S samples in the order of the source, rejected ones too, G groups.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mllm_assets.data.ingest.spec import DatasetSpec
from mllm_assets.data.ingest.split_spec import SIDES, TRAIN, VAL, SplitSpec, guide_places
from mllm_assets.data.quality.groups import SampleGroups
from mllm_assets.data.quality.store import QualityStore, arrow_schema, table_for, utc_now
from mllm_assets.errors import DataError

UNUSED = "unused"
REJECTED = "rejected"
# indexed by `Assignments.splits_S` and `reasons_S`
SPLITS = (*SIDES, UNUSED, REJECTED)
UNUSED_REASONS = ("over_quota", "sample_duplicate", "image_bridges_splits", "dropped")
NONE = -1
# the groups among some samples, ignoring the others
Regroup = Callable[[NDArray[np.bool_]], SampleGroups]
AUGMENTED = "augmented"
BATCH_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Assignments:
    """Where each sample goes.

    Attributes:
        splits_S: An index into `SPLITS`.
        reasons_S: An index into `UNUSED_REASONS` for an unused sample, otherwise -1.
        positions_S: The position in its split, from 0 in the order of the source; -1 for a sample in none.
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
    """Assign every accepted sample to train, val, test or unused, with no group on two sides.

    Fewer samples than asked for shrink the sizes, see `SplitSpec.sizes`. `sample_ids_S` are ASCII; `history_S` is the
    side of samples that were on one under the same `spec` before, an index into `SIDES`, otherwise -1.

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
    pins_G = np.full(len(groups.keys_G), NONE, np.int8)
    pinned = remaining & (history_S != NONE)
    pins_G[groups.groups_S[pinned]] = history_S[pinned]
    sides = _fill(spec, _Members(groups.groups_S, remaining, sample_ids_S), groups.keys_G, pins_G)

    splits = np.where(accepted_S, SPLITS.index(UNUSED), SPLITS.index(REJECTED)).astype(np.int8)
    reasons = np.where(accepted_S, UNUSED_REASONS.index("over_quota"), NONE).astype(np.int8)
    reasons[repeats] = UNUSED_REASONS.index("sample_duplicate")
    reasons[bridging] = UNUSED_REASONS.index("image_bridges_splits")
    positions = np.full(len(sample_ids_S), NONE, np.int64)
    for number, side in sides.items():
        splits[side], reasons[side] = number, NONE
        positions[side] = np.arange(len(side))
    return Assignments(splits, reasons, positions, all_groups)


def _fill(
    spec: SplitSpec, members: "_Members", keys_G: NDArray[np.bytes_], pins_G: NDArray[np.int8]
) -> dict[int, NDArray[np.int64]]:
    """The samples of each side, by its index; `pins_G` is the side that a group was on before."""
    train, val, test = (SPLITS.index(side) for side in SIDES)
    num_available, num_free = members.count(), members.count((pins_G == NONE) | (pins_G == test))
    if num_available < 2:
        raise DataError(
            f"Only {num_available} usable samples are left, but a split needs at least 2. See the reject reasons of "
            "sample_quality, and loosen its limits or give the source more rows."
        )
    sizes = spec.sizes(num_available, num_free)
    hashes = _hashes(spec.seed, keys_G[members.groups])
    order = np.argsort(hashes)
    places = hashes.view(">u8").reshape(len(hashes), -1)[:, 0] / 2.0**64
    between = (spec.num_val + spec.wanted_test / 2) / spec.num_wanted
    orders = {val: order, train: order[::-1], test: np.argsort(np.abs(places - between), kind="stable")}
    sides = {}
    for side, order in orders.items():
        by_place = members.groups[order]
        pins = pins_G[by_place]
        sides[side] = members.fill(np.concatenate([by_place[pins == side], by_place[pins == NONE]]), sizes[side])
        pins_G[members.groups_of(sides[side])] = side
    return sides


def _hashes(seed: int, keys: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
    """Sort keys: pseudo-random, and independent of the other keys."""
    prefix = f"{seed} group ".encode()
    return np.fromiter((hashlib.sha256(prefix + key).digest() for key in keys), "S32", count=len(keys))


def _bridging(
    remaining_S: NDArray[np.bool_], groups: SampleGroups, regroup: Regroup, history_S: NDArray[np.int8]
) -> NDArray[np.bool_]:
    """Samples to leave out so that no group has old samples of two sides: new ones first, then old ones.

    Of old ones those stay that are of the side that is first in `SIDES`.
    """
    affected = remaining_S & _in_torn_group(remaining_S, groups, history_S)
    if not affected.any():
        return affected
    old = affected & (history_S != NONE)
    old_groups = regroup(old)
    first_G = np.full(len(old_groups.keys_G), len(SIDES), np.int8)
    np.minimum.at(first_G, old_groups.groups_S[old], history_S[old])
    later = old.copy()
    later[old] = history_S[old] > first_G[old_groups.groups_S[old]]
    return (affected & ~old) | later


def _in_torn_group(some_S: NDArray[np.bool_], groups: SampleGroups, history_S: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Samples whose group has samples of two sides."""
    num_sides = np.zeros(len(groups.keys_G), np.int8)
    for side in range(len(SIDES)):
        found = np.zeros(len(num_sides), bool)
        found[groups.groups_S[some_S & (history_S == side)]] = True
        num_sides += found
    torn = num_sides > 1
    inside = np.zeros(len(some_S), bool)
    inside[some_S] = torn[groups.groups_S[some_S]]
    return inside


class _Members:
    """The remaining samples of each group."""

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
        self._groups = groups_S

    def count(self, of_G: NDArray[np.bool_] | None = None) -> int:
        """How many samples there are, or are in some of the groups."""
        return int((self._counts[self.groups] * (1 if of_G is None else of_G[self.groups])).sum())

    def groups_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._groups[samples]

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


def assign_as_given(spec: DatasetSpec, samples: pa.Table, num_source_rows: int) -> Assignments:
    """Assign every accepted sample where the source itself puts it, or the guide's shuffle of `num_source_rows`.

    `samples` are an assessment's rows in the source's order, rejected ones too; `row_index` is one of the source rows.

    Raises:
        DataError: A side would be empty.
    """
    accepted = samples["reject_reason"].is_null().to_numpy()
    splits = np.full(len(accepted), SPLITS.index(UNUSED), np.int8)
    positions = np.full(len(accepted), NONE, np.int64)
    if spec.source.is_split:
        sides = samples["source_split"].to_numpy()
        for side in SIDES:
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


def without(assignments: Assignments, dropped_S: NDArray[np.bool_], name: str) -> Assignments:
    """Take samples that a person dropped out of their sides; all others keep side and position, and so their prompt.

    Raises:
        DataError: No sample is left to train, or none to validate.
    """
    here = dropped_S & (assignments.splits_S != SPLITS.index(REJECTED))
    splits, reasons = assignments.splits_S.copy(), assignments.reasons_S.copy()
    positions = assignments.positions_S.copy()
    splits[here], reasons[here], positions[here] = SPLITS.index(UNUSED), UNUSED_REASONS.index("dropped"), NONE
    for side in (TRAIN, VAL):
        if not (splits == SPLITS.index(side)).any():
            raise DataError(
                f"Dataset {name!r}: every sample of {side} was dropped, expected at least 1 left. Take one back: "
                f"mllm-assets review {name} undo SAMPLE"
            )
    return Assignments(splits, reasons, positions, assignments.groups)


def _groups(samples: pa.Table) -> SampleGroups:
    """The groups as the assessment names them."""
    named = samples["duplicate_group"].combine_chunks().dictionary_encode()
    groups = named.indices.fill_null(NONE).to_numpy().astype(np.int64)
    keys = np.array(named.dictionary.to_pylist(), "S16")
    return SampleGroups(groups, keys, np.bincount(groups[groups != NONE], minlength=len(keys)))


def split_key(spec: DatasetSpec) -> str:
    """Identifies a split's history: another seed or other sizes have a history of their own."""
    key = f"seed={spec.split.seed} train={spec.split.num_train} val={spec.split.num_val}"
    if spec.split.num_test is not None:  # otherwise the history from before there were test splits goes on
        key += f" test={spec.split.num_test}"
    if spec.split_is_given:
        key += " source" if spec.source.is_split else " guide"
    return key


def sides_before(store: QualityStore, spec: DatasetSpec, sample_ids: pa.ChunkedArray) -> NDArray[np.int8]:
    """The side that each sample was on last, as an index into `SIDES`, otherwise -1."""
    found = store.query_arrow(
        "SELECT number, list_position(?, arg_max(split, written_at)) - 1 AS side "
        "FROM split_membership JOIN wanted USING (sample_id) "
        "WHERE dataset = ? AND split_key = ? AND list_contains(?, split) GROUP BY number",
        [list(SIDES), spec.name, split_key(spec), list(SIDES)],
        given={"wanted": pa.table({"number": np.arange(len(sample_ids)), "sample_id": sample_ids})},
    )
    sides = np.full(len(sample_ids), NONE, np.int8)
    sides[found["number"].to_numpy()] = found["side"].to_numpy()
    return sides


def membership(
    spec: DatasetSpec,
    split_digest: str,
    assignments: Assignments,
    samples: pa.Table,
    copies: Sequence[tuple[str, str]],
    run_id: str,
) -> pa.RecordBatchReader:
    """The rows of `split_membership`: a row per sample, with the reason if it is in no split, and a row per copy.

    `samples` has the columns `sample_id` and `reject_reason`; `copies` are the augmented copies' ids, each with what
    became of it.
    """
    common = {
        "dataset": spec.name,
        "split_digest": split_digest,
        "split_key": split_key(spec),
        "run_id": run_id,
        "written_at": utc_now(),
    }

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(samples), BATCH_ROWS):
            part = samples.slice(start, BATCH_ROWS)
            columns = {name: pa.repeat(value, len(part)) for name, value in common.items()} | _columns(
                assignments, start, part
            )
            yield from pa.table(columns, schema=arrow_schema("split_membership")).to_batches()
        for start in range(0, len(copies), BATCH_ROWS):
            part = copies[start : start + BATCH_ROWS]
            rows = [{**common, "sample_id": key, "split": AUGMENTED, "reason": fate} for key, fate in part]
            yield from table_for("split_membership", rows).to_batches()

    return pa.RecordBatchReader.from_batches(arrow_schema("split_membership"), batches())


def _columns(assignments: Assignments, start: int, samples: pa.Table) -> dict[str, Any]:
    """The columns that differ by sample, from `start` on."""
    some = slice(start, start + len(samples))
    reasons, positions = assignments.reasons_S[some].tolist(), assignments.positions_S[some]
    rejected = samples["reject_reason"].to_pylist()
    return {
        "sample_id": samples["sample_id"],
        "duplicate_group": assignments.groups.keys(start, start + len(samples)),
        "split": [SPLITS[number] for number in assignments.splits_S[some].tolist()],
        "reason": [
            reject_reason if reason == NONE else UNUSED_REASONS[reason]
            for reason, reject_reason in zip(reasons, rejected, strict=True)
        ],
        "position": pa.array(positions, mask=positions == NONE),
    }
