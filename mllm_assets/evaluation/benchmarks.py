"""Base and tuned model on the same benchmarks: lmms-eval's figures of both, and gains of samples in pairs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.artifacts import (
    digest_json,
    is_sound,
    read_manifest,
    require_sound,
    staged_directory,
    write_json_atomic,
    write_manifest,
)
from mllm_assets.data.quality.report import markdown_table
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.intervals import gain_text, paired_gain
from mllm_assets.evaluation.lmms_results import Sample
from mllm_assets.file_digests import FileDigests
from mllm_assets.layout import Layout

SAMPLES, FIGURES, BENCHMARKS_FILE = "samples.parquet", "figures.json", "benchmarks.json"
AGAIN = "Materialise benchmarks again."
SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("doc_id", pa.int64()),  # lmms-eval's number of the row
        ("question", pa.string()),
        ("target", pa.string()),
        ("answer", pa.string()),  # before the task's filters
        ("pictures", pa.string()),  # digests of those that were sent; null where not known
        ("scores", pa.map_(pa.string(), pa.float64())),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """By task: `num_samples`, `num_pictures`, and of each metric `base`, `tuned` and `gain` (None without samples)."""

    tasks: Mapping[str, Mapping[str, Any]]
    directory: Path
    digest: str

    def markdown(self) -> str:
        """A row for each metric of each task."""
        return markdown_table(
            ("benchmark", "metric", "base", "tuned", "gain a sample (95 % interval)"),
            (
                (f"{task} ({one['num_samples']})", name, f"{row['base']:.4g}", f"{row['tuned']:.4g}", row["shown"])
                for task, one in self.tasks.items()
                for name, row in one["metrics"].items()
            ),
        )


def to_table(samples: Sequence[Sample]) -> pa.Table:
    """A row a sample."""
    names = [field.name for field in SCHEMA if field.name != "scores"]
    rows = [
        {**{name: getattr(sample, name) for name in names}, "scores": list(sample.scores.items())} for sample in samples
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def folder_digest(folder: Path) -> str:
    """What names the content of a folder of tasks; hidden files and compiled code do not count."""
    files, digests = {}, FileDigests()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and "__pycache__" not in name.parts and not any(part[0] == "." for part in name.parts):
            files[name.as_posix()] = digests.of(path)
    return digest_json(files)


def compare_benchmarks(base: Path, tuned: Path) -> dict[str, dict[str, Any]]:
    """Compare what two models said, as `Compared.tasks`; gains are positive where the tuned model is better.

    Args:
        base: The directory of the base model's answers.
        tuned: That of the tuned model's.

    Raises:
        IntegrityError: A file is damaged, or the models were not asked the same.
    """
    rows = {name: _rows(directory) for name, directory in (("base", base), ("tuned", tuned))}
    if rows["base"].keys() != rows["tuned"].keys() or not all(
        _is_same(row, rows["tuned"][key]) for key, row in rows["base"].items()
    ):
        raise IntegrityError(f"Base and tuned model were not asked the same: {base}, {tuned}. {AGAIN}")
    facts = {name: _figures(directory) for name, directory in (("base", base), ("tuned", tuned))}
    found: dict[str, dict[str, Any]] = {}
    for task, figures in facts["tuned"]["figures"].items():
        keys = [key for key in rows["tuned"] if key[0] == task]
        pictures = _numbers([rows["tuned"][key]["pictures"] or rows["base"][key]["pictures"] for key in keys])
        better = facts["tuned"]["higher_is_better"].get(task, {})
        metrics = {}
        for metric, value in figures.items():
            if metric not in facts["base"]["figures"].get(task, {}):
                continue
            sign = 1 if better.get(metric, True) else -1
            scores = [[rows[name][key]["scores"].get(metric) for key in keys] for name in ("base", "tuned")]
            gain = _gain(scores[0], scores[1], sign, pictures)
            metrics[metric] = {
                "base": facts["base"]["figures"][task][metric], "tuned": value, "higher_is_better": sign > 0,
                "gain": gain, "shown": gain_text(gain),
            }  # fmt: skip
        found[task] = {
            "num_samples": len(keys),
            "num_pictures": None if pictures is None else len(np.unique(pictures)),
            "metrics": metrics,
        }
    return found


def _gain(base: list[Any], tuned: list[Any], sign: int, pictures: np.ndarray | None) -> dict[str, Any] | None:
    """None where lmms-eval has no number for each sample, such as of a score of all answers together."""
    if None in base or None in tuned:
        return None
    return paired_gain(sign * (np.array(tuned) - np.array(base)), pictures)


def _numbers(pictures: list[str | None]) -> np.ndarray | None:
    """A number for each picture; None where they are not known or there is none, and samples count one by one."""
    if not all(pictures):
        return None
    numbers = {name: number for number, name in enumerate(dict.fromkeys(pictures))}
    return np.array([numbers[name] for name in pictures])


def _is_same(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> bool:
    """Whether two rows ask the same; of which nobody knows the pictures only the texts can be compared."""
    names = ("question", "target", *(["pictures"] if base["pictures"] and tuned["pictures"] else []))
    return all(base[name] == tuned[name] for name in names)


def _rows(directory: Path) -> dict[tuple[str, int], dict[str, Any]]:
    require_sound(directory, AGAIN)
    rows = pq.read_table(directory / SAMPLES).to_pylist()
    return {(row["task"], row["doc_id"]): {**row, "scores": dict(row["scores"])} for row in rows}


def _figures(directory: Path) -> dict[str, Any]:
    return json.loads((directory / FIGURES).read_text(encoding="utf-8"))


def publish_benchmarks(layout: Layout, recipe: str, base: Path, tuned: Path) -> Compared:
    """Compare, and write it with the samples of both models to a folder that is named by all of it."""
    tasks = compare_benchmarks(base, tuned)
    asked = {name: read_manifest(directory) for name, directory in (("base", base), ("tuned", tuned))}
    lineage = {name: one["lineage"] for name, one in asked.items()}
    digest = digest_json([tasks, lineage])
    directory = layout.benchmarks(recipe, digest[:16])
    if not is_sound(directory):
        with staged_directory(directory) as staging:
            write_json_atomic(staging / BENCHMARKS_FILE, tasks)
            pq.write_table(_both(base, tuned), staging / SAMPLES)
            write_manifest(staging, {"recipe": recipe, "digest": digest, **lineage})
    return Compared(tasks=tasks, directory=directory, digest=digest)


def read_benchmarks(directory: Path) -> dict[str, Any]:
    """The comparison that was published in a directory, as `Compared.tasks`."""
    return json.loads((directory / BENCHMARKS_FILE).read_text(encoding="utf-8"))


def _both(base: Path, tuned: Path) -> pa.Table:
    tables = []
    for name, directory in (("base", base), ("tuned", tuned)):
        rows = pq.read_table(directory / SAMPLES)
        tables.append(rows.add_column(0, "model", pa.array([name] * len(rows), pa.string())))
    return pa.concat_tables(tables)
