"""What people's corrections gained: one recipe with and without them, both asked the same about the same samples."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mllm_assets.artifacts import digest_json, is_sound, staged_directory, write_json_atomic, write_manifest
from mllm_assets.data.quality.report import markdown_table
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.intervals import gain_text
from mllm_assets.evaluation.metrics import answers_of, gains_over_release, tuned_by_entry
from mllm_assets.evaluation.scores import in_order
from mllm_assets.layout import Layout

GAINED_FILE = "what_it_gained.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gained:
    """By entry: `num_samples`, and of each metric `without`, `with` and `gain` (mean and interval)."""

    entries: Mapping[str, Mapping[str, Any]]
    directory: Path
    digest: str

    def markdown(self) -> str:
        """A row for each metric of each entry."""
        return markdown_table(
            ("entry", "metric", "without corrections", "with", "gain (95 % interval)"),
            (
                (f"{entry} ({one['num_samples']})", name, f"{row['without']:.4g}", f"{row['with']:.4g}", row["shown"])
                for entry, one in self.entries.items()
                for name, row in one["metrics"].items()
            ),
        )


def compare_corrected(with_rows: pa.Table, without_rows: pa.Table) -> dict[str, dict[str, Any]]:
    """Compare two tuned models' predictions, as `Gained.entries`; gains are positive where corrections made it better.

    Raises:
        IntegrityError: They were asked nothing in common.
    """
    gains = gains_over_release(with_rows, without_rows)
    if not gains:
        raise IntegrityError(
            "The models with and without corrections were asked nothing in common. Materialise the predictions again."
        )
    now, then = tuned_by_entry(with_rows), tuned_by_entry(without_rows)
    found = {}
    for entry, gained in gains.items():
        scored, before = answers_of(now[entry]).totals, answers_of(then[entry]).totals
        found[entry] = {
            "num_samples": len(now[entry]),
            "metrics": {
                name: {
                    "without": before[name], "with": scored[name], "gain": gained[name],
                    "shown": gain_text(gained[name]),
                }
                for name in in_order(name for name in gained if name in before and name in scored)
            },
        }  # fmt: skip
    return found


def publish_gained(
    layout: Layout, recipe: str, with_rows: pa.Table, without_rows: pa.Table, lineage: Mapping[str, Any]
) -> Gained:
    """Compare, and write it to a folder that is named by all of it; `lineage` says which runs and predictions."""
    entries = compare_corrected(with_rows, without_rows)
    digest = digest_json([entries, lineage])
    directory = layout.gained(recipe, digest[:16])
    if not is_sound(directory):
        with staged_directory(directory) as staging:
            write_json_atomic(staging / GAINED_FILE, entries)
            write_manifest(staging, {"recipe": recipe, "digest": digest, **lineage})
    read = json.loads((directory / GAINED_FILE).read_text(encoding="utf-8"))
    return Gained(entries=read, directory=directory, digest=digest)
