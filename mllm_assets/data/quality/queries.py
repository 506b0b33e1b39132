"""`mllm-assets quality`: the saved views of the DuckDB file, for one dataset or one recipe."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.quality.views import ASKED, ASKED_OF_RECIPES
from mllm_assets.errors import DataError, RecipeError, did_you_mean
from mllm_assets.layout import Layout

PROSE = ("caption", "reference", "answer")
# What a terminal of 80 columns shows of each view, and its heading; `--wide` and `--json` have all columns
SHOWN: Mapping[str, Mapping[str, str]] = {
    "worst": {"source_location": "where", "issue": "issue", "score": "score", "score_limit": "limit"},
    "leaks": {
        "held_out_location": "where", "split": "split", "train_dataset": "trained on in", "train_location": "where",
        "kind": "kind",
    },
    "duplicates": {
        "location_a": "first", "caption_a": "its caption", "location_b": "second", "caption_b": "its caption",
        "kind": "kind",
    },
    "captions": {
        "source_location": "where", "issue": "issue", "num_with_this_caption": "samples", "caption": "caption",
    },
    "rejects": {"source_location": "where", "reason": "reason", "looked_for": "looked for", "caption": "caption"},
    "hardest": {
        "source_location": "where", "reference": "right answer", "answer": "answer", "is_right": "right",
        "loss_nats": "loss",
    },
}  # fmt: skip
MEMORY = "1GB"  # a view ranks all samples: half a million take more than a writer may
MAX_PROSE_CHARS = {False: 60, True: 160}  # on a terminal, by whether it is wide
NOTHING = {
    "worst": "No sample of {dataset} has a measured image; see: mllm-assets quality rejects --dataset {dataset}",
    "leaks": "No picture of {dataset}'s validation and test samples is trained on.",
    "duplicates": "No two samples of {dataset} show the same picture.",
    "captions": "No sample of {dataset} has a caption.",
    "rejects": "No sample of {dataset} was rejected.",
}


def ask(layout: Layout, view: str, name: str, limit: int | None) -> list[dict[str, Any]]:
    """The first rows of a view for a dataset, or for a recipe if the view is of recipes; without its name.

    Raises:
        DataError: No dataset of this root was assessed yet.
        RecipeError: This dataset was not assessed, or this recipe not evaluated; names those that were.
    """
    assert view in (*ASKED, *ASKED_OF_RECIPES)
    if not layout.quality_db.exists():
        raise DataError(
            f"{layout.quality_db} does not exist. Make a dataset (mllm-assets run DATASET), or set "
            "MLLM_ASSETS_ROOT to the folder that contains data/."
        )
    store = QualityStore(layout.quality_db, query_memory=MEMORY)
    what, table = ("recipe", "latest_predictions") if view in ASKED_OF_RECIPES else ("dataset", "assessments")
    known = [row["name"] for row in store.query(f"SELECT DISTINCT {what} AS name FROM {table} ORDER BY name")]
    if name not in known:
        hint = did_you_mean(name, known)
        listed = ", ".join(known) or "none"
        asset = "RECIPE/predictions" if what == "recipe" else "DATASET/sample_quality"
        raise RecipeError(
            f"No {what} {name!r} in {layout.quality_db}; it has: {listed}. {hint}To add one: mllm-assets run {asset}"
        )
    return store.query(
        f'SELECT * EXCLUDE ({what}, rank) FROM "{view}" WHERE {what} = ? ORDER BY rank LIMIT ?', [name, limit]
    )


def print_rows(rows: Sequence[Mapping[str, Any]], *, view: str, name: str, as_json: bool, wide: bool) -> None:
    """Print rows as JSON or as a table, of a few columns unless it is `wide`; only prose is cut, on a terminal."""
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False, default=str))
        return
    if not rows:
        print(NOTHING[view].format(dataset=name))
        return
    from mllm_assets.tables import print_table

    shown = {column: column for column in rows[0]} if wide else SHOWN[view]
    shown = {column: title for column, title in shown.items() if wide or any(row[column] is not None for row in rows)}
    folded = [column for column in shown if column.startswith(PROSE) or (not wide and "location" in column)]
    print_table(
        list(shown.values()),
        [[_shown(row[column], MAX_PROSE_CHARS[wide] if column.startswith(PROSE) else None) for column in shown]
         for row in rows],
        numbers=[title for column, title in shown.items() if any(isinstance(row[column], int | float) for row in rows)],
        prose=[shown[column] for column in folded],
    )  # fmt: skip


def _shown(value: Any, most_chars: int | None) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list():
            return " ".join(value)
        case str() if len(value) == 64 and value.isalnum():
            return value[:16]  # an image's digest; these digits name its published file
    text = "".join(char if char.isprintable() else " " for char in str(value))
    return f"{text[: most_chars - 1]}…" if most_chars and len(text) > most_chars and sys.stdout.isatty() else text
