"""`mllm-assets quality`: the saved views of the DuckDB file, for one dataset."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_assets.errors import DataError, RecipeError
from mllm_assets.layout import Layout
from mllm_assets.quality.store import QualityStore
from mllm_assets.quality.views import ASKED

NOTHING = {
    "worst": "No sample of {dataset} has a measured image; see: mllm-assets quality rejects --dataset {dataset}",
    "leaks": "No picture of {dataset}'s validation samples is trained on.",
    "duplicates": "No two samples of {dataset} show the same picture.",
    "captions": "No sample of {dataset} has a caption.",
    "rejects": "No sample of {dataset} was rejected.",
}


def ask(layout: Layout, view: str, dataset: str, limit: int | None) -> list[dict[str, Any]]:
    """The first rows of a view for a dataset, without the dataset's name.

    Raises:
        DataError: No dataset was assessed yet below this root.
        RecipeError: This one was not; names those that were.
    """
    assert view in ASKED
    if not layout.quality_db.exists():
        raise DataError(
            f"There is no {layout.quality_db}. Materialise a dataset's sample_quality first, or set MLLM_ASSETS_ROOT "
            "to the folder that holds data/."
        )
    store = QualityStore(layout.quality_db)
    known = [row["dataset"] for row in store.query("SELECT DISTINCT dataset FROM assessments ORDER BY dataset")]
    if dataset not in known:
        near = difflib.get_close_matches(dataset, known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        listed = ", ".join(known) or "none"
        raise RecipeError(
            f"No dataset {dataset!r} in {layout.quality_db}; it has: {listed}. {hint}"
            f"Otherwise materialise {dataset}/sample_quality."
        )
    return store.query(
        f'SELECT * EXCLUDE (dataset, rank) FROM "{view}" WHERE dataset = ? ORDER BY rank LIMIT ?', [dataset, limit]
    )


def print_rows(rows: Sequence[Mapping[str, Any]], *, view: str, dataset: str, as_json: bool) -> None:
    """Print rows as JSON or as a table; where the output is no terminal nothing is cut to its width."""
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False, default=str))
        return
    if not rows:
        print(NOTHING[view].format(dataset=dataset))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=10_000, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in rows[0]:
        is_number = any(isinstance(row[name], int | float) for row in rows)
        is_prose = name.startswith("caption")
        table.add_column(name, justify="right" if is_number else "left", overflow="ellipsis", no_wrap=not is_prose)
    for row in rows:
        table.add_row(*(Text(_shown(value)) for value in row.values()))
    console.print(table)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(value)
    if isinstance(value, str) and len(value) == 64 and value.isalnum():
        return value[:16]  # an image's digest; its published file has these as its name
    text = "".join(char if char.isprintable() else " " for char in str(value))
    return text if len(text) <= 160 else f"{text[:159]}…"
