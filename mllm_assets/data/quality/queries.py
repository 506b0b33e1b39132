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
            f"{layout.quality_db} does not exist. Materialise a dataset's sample_quality first, or set "
            "MLLM_ASSETS_ROOT to the folder that contains data/."
        )
    store = QualityStore(layout.quality_db)
    what, table = ("recipe", "latest_predictions") if view in ASKED_OF_RECIPES else ("dataset", "assessments")
    known = [row["name"] for row in store.query(f"SELECT DISTINCT {what} AS name FROM {table} ORDER BY name")]
    if name not in known:
        hint = did_you_mean(name, known)
        listed = ", ".join(known) or "none"
        asset = f"{name}/predictions" if what == "recipe" else f"{name}/sample_quality"
        raise RecipeError(
            f"No {what} {name!r} in {layout.quality_db}; it has: {listed}. {hint}Otherwise materialise {asset}."
        )
    return store.query(
        f'SELECT * EXCLUDE ({what}, rank) FROM "{view}" WHERE {what} = ? ORDER BY rank LIMIT ?', [name, limit]
    )


def print_rows(rows: Sequence[Mapping[str, Any]], *, view: str, name: str, as_json: bool) -> None:
    """Print rows as JSON or as a table; only prose is cut, and only on a terminal."""
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False, default=str))
        return
    if not rows:
        print(NOTHING[view].format(dataset=name))
        return
    from mllm_assets.tables import print_table

    columns = list(rows[0])
    print_table(
        columns,
        [[_shown(value, is_prose=column.startswith(PROSE)) for column, value in row.items()] for row in rows],
        numbers=[column for column in columns if any(isinstance(row[column], int | float) for row in rows)],
        prose=[column for column in columns if column.startswith(PROSE)],
    )


def _shown(value: Any, *, is_prose: bool) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(value)
    if isinstance(value, str) and len(value) == 64 and value.isalnum():
        return value[:16]  # an image's digest; these digits name its published file
    text = "".join(char if char.isprintable() else " " for char in str(value))
    return f"{text[:159]}…" if is_prose and len(text) > 160 and sys.stdout.isatty() else text
