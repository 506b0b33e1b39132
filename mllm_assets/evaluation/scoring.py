"""From a recipe's predictions to its metrics at rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json
from mllm_assets.data.sharegpt import load_rows
from mllm_assets.evaluation.metrics import compute_metrics
from mllm_assets.evaluation.metrics_file import metric_rows, write_metrics
from mllm_assets.evaluation.over_release import gains_over_release
from mllm_assets.evaluation.release import read_judged
from mllm_assets.evaluation.release_versions import current_release
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout
from mllm_assets.training.spec import TrainSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """Metrics and where they are.

    Attributes:
        metrics: As in `eval_metrics.json`.
        directory: Holds that file.
        digest: The metrics' own, their data version.
        num_samples: That the models were asked, of all entries.
    """

    metrics: Mapping[str, Any]
    directory: Path
    digest: str

    @property
    def num_samples(self) -> int:
        return sum(scored["num_samples"] for scored in self.metrics["entries"].values())

    def rows(self, *, run_id: str, recipe: str, checkpoint_digest: str) -> pa.Table:
        """The rows of DuckDB's `eval_metrics`."""
        return metric_rows(self.metrics, run_id=run_id, recipe=recipe, checkpoint_digest=checkpoint_digest)


def score_predictions(
    layout: Layout, recipe_name: str, spec: TrainSpec, predictions_dir: Path, predicted: Mapping[str, Any]
) -> Scored:
    """Score a recipe's predictions against the base model, the most common answer and the current release.

    Args:
        layout: The project.
        recipe_name: Whose release they are held against.
        spec: The recipe; the answers that it trains on give the most common one.
        predictions_dir: What the models said.
        predicted: `weights_digest`, `data_version` and `data_digests` of the predictions, kept with the metrics.

    Raises:
        IntegrityError: The predictions, or those of the release, are not whole.
    """
    rows = read_predictions(predictions_dir)
    release = current_release(layout, recipe_name)
    metrics = compute_metrics(rows, _train_answers(layout.root / spec.dataset_dir, spec.train_entries)) | {
        "release": release.version if release else None,
        "over_release": gains_over_release(rows, read_judged(release)) if release else None,
    }
    inputs = {
        "weights_digest": predicted["weights_digest"],
        "predictions": predicted["data_version"],
        "predictions_path": layout.relative(predictions_dir),
        "data_digests": predicted["data_digests"],
    }
    directory = layout.metrics(recipe_name, digest_json([__version__, inputs, metrics])[:16])
    return Scored(metrics=metrics, directory=directory, digest=write_metrics(directory, metrics, inputs)["digest"])


def _train_answers(data_dir: Path, entries: Sequence[str]) -> list[str]:
    return [row.messages[-1].content for entry in entries for row in load_rows(data_dir, entry)]
