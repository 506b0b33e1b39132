"""What a release is judged by: the metrics, the predictions that they were made of, and what both are about."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mllm_assets.artifacts import find_damage, read_manifest
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.metrics_file import METRICS_FILE, read_metrics
from mllm_assets.evaluation.table import PREDICTIONS_FILE, read_predictions
from mllm_assets.layout import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """Metrics and their predictions.

    Attributes:
        metrics: What `compute_metrics` returned.
        predictions: The rows that they were made of.
        weights_digest: Of the model that was asked.
        data_digests: `entry_digest` of each evaluation entry when it was asked.
    """

    metrics: dict[str, Any]
    predictions: pa.Table
    weights_digest: str
    data_digests: Mapping[str, str]


def read_judgement(metrics_dir: Path, layout: Layout) -> Judgement:
    """Read metrics and predictions, byte for byte as they were written.

    Raises:
        IntegrityError: A file was changed since, or is gone. Names it.
    """
    inputs = read_manifest(metrics_dir)["inputs"]
    predictions_dir = layout.root / inputs["predictions_path"]
    for directory, name in ((metrics_dir, METRICS_FILE), (predictions_dir, PREDICTIONS_FILE)):
        if damage := find_damage(directory, only=[name]):
            raise IntegrityError(
                f"{directory}: {damage}, so nothing can be judged by it. Delete the folder and materialise "
                "predictions and eval_metrics again."
            )
    return Judgement(
        metrics=read_metrics(metrics_dir),
        predictions=read_predictions(predictions_dir),
        weights_digest=inputs["weights_digest"],
        data_digests=inputs["data_digests"],
    )
