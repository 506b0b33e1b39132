"""Metrics at rest: `eval_metrics.json` in a directory named by what was scored, and rows of DuckDB."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from mllm_assets.artifacts import (
    digest_json,
    is_complete,
    read_manifest,
    staged_directory,
    write_json_atomic,
    write_manifest,
)
from mllm_assets.evaluation.table import with_run

METRICS_FILE = "eval_metrics.json"


def metric_rows(metrics: Mapping[str, Any], *, run_id: str, recipe: str, checkpoint_digest: str) -> pa.Table:
    """The rows of DuckDB's `eval_metrics`."""
    rows = [
        {"model": model, "entry": entry, "metric": metric, "value": value, "num_samples": scored["num_samples"]}
        for entry, scored in metrics["entries"].items()
        for model, values in scored["models"].items()
        for metric, value in values.items()
    ]
    return with_run(pa.Table.from_pylist(rows), run_id=run_id, recipe=recipe, checkpoint_digest=checkpoint_digest)


def write_metrics(target: Path, metrics: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Publish `eval_metrics.json` in `target` and return the manifest; `digest` in it is the data version.

    Args:
        target: A directory named by what is scored; a complete one is kept as it is.
        metrics: What `compute_metrics` returned.
        inputs: What the metrics were made from (digests of predictions and checkpoint), for the manifest.
    """
    if not is_complete(target):
        with staged_directory(target) as staging:
            write_json_atomic(staging / METRICS_FILE, metrics)
            write_manifest(staging, {"inputs": dict(inputs), "digest": digest_json(metrics)})
    return read_manifest(target)


def read_metrics(directory: Path) -> dict[str, Any]:
    """Read `eval_metrics.json` of a complete directory."""
    read_manifest(directory)
    return json.loads((directory / METRICS_FILE).read_text(encoding="utf-8"))
