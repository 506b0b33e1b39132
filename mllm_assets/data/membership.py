"""Which sample was on which side, in DuckDB: the history that keeps splits stable, and what becomes of each sample."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mllm_assets.data.assign import NONE, SPLITS, TRAIN, UNUSED_REASONS, Assignments
from mllm_assets.data.spec import DatasetSpec
from mllm_assets.quality.store import QualityStore, arrow_schema, table_for, utc_now

AUGMENTED = "augmented"
BATCH_ROWS = 8192


def split_key(spec: DatasetSpec) -> str:
    """What the history hangs on: another seed or other sizes are another split, with a history of its own."""
    key = f"seed={spec.split.seed} train={spec.split.num_train} val={spec.split.num_val}"
    if spec.split_is_given:
        key += " source" if spec.source.val_split is not None else " guide"
    return key


def sides_before(store: QualityStore, spec: DatasetSpec, sample_ids: pa.ChunkedArray) -> NDArray[np.int8]:
    """The side of each sample when it trained or validated last, 0 or 1 as in `assign.SPLITS`, otherwise -1."""
    found = store.query_arrow(
        "SELECT number, arg_max(split, written_at) = ? AS is_train FROM split_membership JOIN wanted USING (sample_id) "
        "WHERE dataset = ? AND split_key = ? AND split IN ('train', 'val') GROUP BY number",
        [TRAIN, spec.name, split_key(spec)],
        given={"wanted": pa.table({"number": np.arange(len(sample_ids)), "sample_id": sample_ids})},
    )
    sides = np.full(len(sample_ids), NONE, np.int8)
    sides[found["number"].to_numpy()] = ~found["is_train"].to_numpy()
    return sides


def membership(
    spec: DatasetSpec,
    split_digest: str,
    assignments: Assignments,
    samples: pa.Table,
    copies: Sequence[tuple[str, str]],
    run_id: str,
) -> pa.RecordBatchReader:
    """The rows of `split_membership`: a row a sample, with the reason where it is in no split, and a row a copy.

    Args:
        spec: The dataset.
        split_digest: Of the version.
        assignments: Where each sample goes.
        samples: Columns `sample_id` and `reject_reason`, in the same order.
        copies: The id of each augmented copy, and what became of it.
        run_id: Recorded in every row.
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
            columns = {name: [value] * len(part) for name, value in common.items()} | _columns(assignments, start, part)
            yield from pa.table(columns, schema=arrow_schema("split_membership")).to_batches()
        for start in range(0, len(copies), BATCH_ROWS):
            part = copies[start : start + BATCH_ROWS]
            rows = [{**common, "sample_id": key, "split": AUGMENTED, "reason": fate} for key, fate in part]
            yield from table_for("split_membership", rows).to_batches()

    return pa.RecordBatchReader.from_batches(arrow_schema("split_membership"), batches())


def _columns(assignments: Assignments, start: int, samples: pa.Table) -> dict[str, Any]:
    """What differs from sample to sample, of those from `start` on."""
    some = slice(start, start + len(samples))
    reasons, positions = assignments.reasons_S[some].tolist(), assignments.positions_S[some]
    rejected = samples["reject_reason"].to_pylist()
    return {
        "sample_id": samples["sample_id"],
        "duplicate_group": [assignments.groups.key(number) for number in range(start, start + len(samples))],
        "split": [SPLITS[number] for number in assignments.splits_S[some].tolist()],
        "reason": [
            reject_reason if reason == NONE else UNUSED_REASONS[reason]
            for reason, reject_reason in zip(reasons, rejected, strict=True)
        ],
        "position": pa.array(positions, mask=positions == NONE),
    }
