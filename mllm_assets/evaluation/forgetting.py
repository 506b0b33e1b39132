"""What a model forgot: its loss on questions that have nothing to do with its training, against the base model's.

`plain_questions`, 32 questions without pictures, ships with the package; any entry of the project's `dataset_info.json`
that is not trained on serves as well.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets import sample_data
from mllm_assets.artifacts import read_manifest, require_sound
from mllm_assets.data.quality.report import markdown_table
from mllm_assets.data.sharegpt.dataset import Dataset, Entry
from mllm_assets.data.sharegpt.entries import read_dataset_info
from mllm_assets.errors import RecipeError
from mllm_assets.evaluation.intervals import gain_text
from mllm_assets.evaluation.metrics import compute_metrics

PLAIN_QUESTIONS = "plain_questions"
UNRELATED_FILE = "unrelated.parquet"  # the table of predictions about these entries
_SHIPPED = Path(sample_data.__file__).with_name(PLAIN_QUESTIONS)


def require_not_trained_on(names: Iterable[str], trained_on: Collection[str]) -> None:
    """Refuse to measure forgetting on what is learnt.

    Raises:
        RecipeError: Names the entry.
    """
    for name in names:
        if name in trained_on:
            raise RecipeError(
                f"evaluation.unrelated names {name}, which the recipe trains on: what was forgotten is measured on "
                f"other questions. Name another entry, or {PLAIN_QUESTIONS}."
            )


def unrelated_entries(dataset: Dataset, names: Sequence[str], trained_on: Collection[str]) -> dict[str, Entry]:
    """The entries by which forgetting is measured.

    Raises:
        RecipeError: There is no such entry, or it was trained on.
        DataError: `dataset_info.json` is missing or wrong.
    """
    require_not_trained_on(names, trained_on)
    found: dict[str, Entry] = {}
    for name in names:
        own = name != PLAIN_QUESTIONS or name in read_dataset_info(dataset.data_dir)
        found[name] = dataset.entry(name) if own else dataset.at(_SHIPPED).entry(name)
    return found


def measure_forgetting(predictions_dir: Path) -> dict[str, Any]:
    """Compare what both models gave for the unrelated entries; empty where none was asked.

    Returns:
        By entry: `num_samples`, `models` (their metrics) and `gains` of the tuned model over the base model.

    Raises:
        IntegrityError: The file is damaged.
    """
    if UNRELATED_FILE not in read_manifest(predictions_dir)["files"]:
        return {}
    require_sound(predictions_dir, "Materialise predictions again.", only=[UNRELATED_FILE])
    rows = pq.read_table(predictions_dir / UNRELATED_FILE)
    scored = compute_metrics(rows, _references(rows))["entries"]
    return {
        entry: {
            "num_samples": one["num_samples"],
            "models": {model: one["models"][model] for model in ("base", "tuned")},
            "gains": one["gains"]["tuned_over_base"],
        }
        for entry, one in scored.items()
    }


def _references(rows: pa.Table) -> Sequence[str]:
    return rows.column("reference").to_pylist()


def forgetting_markdown(forgetting: Mapping[str, Any]) -> str:
    """A row an entry: the loss of both models, and its change with the interval."""
    return markdown_table(
        ("entry", "loss, base → tuned", "gain (95 % interval)"),
        (
            (
                f"{entry} ({one['num_samples']})",
                f"{one['models']['base']['loss']:.4g} → {one['models']['tuned']['loss']:.4g}",
                gain_text(one["gains"]["loss"]),
            )
            for entry, one in forgetting.items()
        ),
    )
