"""The table of predictions: its columns, its digest and the rows that go into DuckDB."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.artifacts import digest_json, require_sound

PREDICTIONS_FILE = "predictions.parquet"

SCHEMA = pa.schema(
    [
        ("model", pa.string()),  # "base" or "tuned"
        ("entry", pa.string()),
        ("sample_id", pa.string()),
        ("row_index", pa.int64()),  # position within the entry
        ("images", pa.list_(pa.string())),  # relative to the data directory
        ("prompt", pa.string()),  # the last user turn, without its image placeholders
        ("reference", pa.string()),  # the last assistant turn
        ("label", pa.string()),  # null where the dataset has none
        ("answer", pa.string()),
        ("loss_nats", pa.float64()),  # mean over the row's supervised tokens
        ("loss_shuffled_nats", pa.float64()),  # the same with another sample's images; null where there is none
        ("num_supervised_tokens", pa.int64()),
        ("num_answer_tokens", pa.int64()),
        ("latency_s", pa.float64()),  # generation time of the batch divided by its rows
    ]
)

OF_PAIRS = {"asked": "pairs"}  # the table's metadata where each answer is the one of a pair that a model prefers
STORE_COLUMNS = [name for name in SCHEMA.names if name != "images"]


def to_table(rows: Sequence[dict[str, Any]], *, of_pairs: bool = False) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA.with_metadata(OF_PAIRS) if of_pairs else SCHEMA)


def is_of_pairs(predictions: pa.Table) -> bool:
    """Whether each answer is the one of a pair that a model prefers."""
    return (predictions.schema.metadata or {}).get(b"asked") == b"pairs"


def read_predictions(directory: Path, *, columns: Sequence[str] | None = None, model: str | None = None) -> pa.Table:
    """Read the predictions of a complete directory, or some columns of one model's.

    Raises:
        IntegrityError: They were never finished, or are damaged.
    """
    require_sound(directory, "Materialise predictions again.", only=[PREDICTIONS_FILE])
    rows = None if model is None else [("model", "=", model)]
    return pq.read_table(directory / PREDICTIONS_FILE, columns=columns and list(columns), filters=rows)


def predictions_digest(*predictions: pa.Table) -> str:
    """sha256 over all columns but the latency, of one table or of several after one another."""
    return digest_json([row for table in predictions for row in table.drop_columns(["latency_s"]).to_pylist()])


def store_table(
    predictions: pa.Table, metrics: Sequence[Mapping[str, float]], *, run_id: str, recipe: str, checkpoint_digest: str
) -> pa.Table:
    """The rows as DuckDB's `predictions` holds them, with each sample's metrics."""
    as_json = pa.array([json.dumps(row) for row in metrics], pa.string())
    return with_run(
        predictions.select(STORE_COLUMNS).append_column("metrics", as_json),
        run_id=run_id,
        recipe=recipe,
        checkpoint_digest=checkpoint_digest,
    )


def with_run(table: pa.Table, *, run_id: str, recipe: str, checkpoint_digest: str) -> pa.Table:
    """Put the columns that name the run before the others."""
    names = {"run_id": run_id, "recipe": recipe, "checkpoint_digest": checkpoint_digest}
    for position, (name, value) in enumerate(names.items()):
        table = table.add_column(position, pa.field(name, pa.string()), pa.array([value] * len(table), pa.string()))
    return table
