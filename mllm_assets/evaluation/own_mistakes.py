"""Pairs of answers without an annotator: the reference, and what the model itself said where that was wrong.

data/<recipe>_preferences -> .preferences/<recipe>/<digest>/
                                 pairs.json       an entry with `ranking: true`
                                 manifest.json    which model said it, of which rows of which entries
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import (
    digest_json,
    is_sound,
    point_symlink,
    read_manifest,
    staged_directory,
    write_json_atomic,
    write_manifest,
)
from mllm_assets.data.curate.register import build_entry, write_entries
from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import DataError
from mllm_assets.evaluation.gallery import rights_of
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout

PAIRS_FILE = "pairs.json"


def preferences_entry(recipe: str) -> str:
    """The name of the entry of `dataset_info.json` that holds a recipe's pairs."""
    return f"{recipe}_preferences"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistakes:
    """What a model said wrongly of the rows that it was trained on.

    Attributes:
        directory: Where the pairs are.
        digest: Identifies them.
        num_asked: The rows that were asked about.
        left_out: How many answers are no pair, by reason.
        num_pairs: The others.
    """

    directory: Path
    digest: str
    num_asked: int
    left_out: Mapping[str, int]
    num_pairs: int


def publish_mistakes(
    layout: Layout, recipe: str, dataset: Dataset, answers_dir: Path, *, max_new_tokens: int, lineage: Mapping[str, Any]
) -> Mistakes:
    """Write the pairs and their entry in `dataset_info.json`.

    Args:
        layout: Where the project is.
        recipe: Whose model was asked.
        dataset: What it was asked about.
        answers_dir: The complete predictions of the rows that it was trained on.
        max_new_tokens: Answers of so many tokens were cut, and are no pairs.
        lineage: What the manifest says of the model and the data.

    Raises:
        DataError: Nothing was wrong.
    """
    left_out: Counter[str] = Counter()
    answers = read_predictions(answers_dir, model="tuned")
    told = [said | {"is_right": right} for said, right in zip(answers.to_pylist(), rights_of(answers), strict=True)]
    rows = {name: dataset.entry(name).rows for name in dict.fromkeys(said["entry"] for said in told)}
    pairs = [
        pair
        for said in told
        for pair in _pair(rows[said["entry"]][said["row_index"]], said, max_new_tokens, layout.data, left_out)
    ]
    if not pairs:
        raise DataError(
            f"{recipe}: of {len(told)} answers to rows that it was trained on none makes a pair "
            f"({_counted(left_out)}), so there is nothing to prefer. Train it for fewer steps, or delete `preferences`."
        )
    digest = digest_json(pairs)[:16]
    directory = layout.preferences(recipe, digest)
    if not is_sound(directory):
        with staged_directory(directory) as staging:
            write_json_atomic(staging / PAIRS_FILE, pairs)
            counts = {"num_asked": len(told), "num_pairs": len(pairs), "left_out": dict(left_out)}
            write_manifest(staging, {"recipe": recipe, **lineage, **counts})
    name = preferences_entry(recipe)
    point_symlink(layout.data / name, directory)
    write_entries(layout, name, {name: pairs_entry(f"{name}/{PAIRS_FILE}")})
    known = read_manifest(directory)
    return Mistakes(
        directory=directory,
        digest=digest,
        num_asked=known["num_asked"],
        left_out=known["left_out"],
        num_pairs=known["num_pairs"],
    )


def pairs_entry(file_name: str) -> dict[str, Any]:
    """An entry of pairs."""
    entry = build_entry(file_name)
    return {**entry, "ranking": True, "columns": {**entry["columns"], "chosen": "chosen", "rejected": "rejected"}}


def _pair(
    row: Row, said: Mapping[str, Any], max_new_tokens: int, data_dir: Path, left_out: "Counter[str]"
) -> Iterator[dict[str, Any]]:
    """The pair of an answer, or none, and the reason is counted."""
    answer = said["answer"].strip()
    reasons = {
        "right": bool(said["is_right"]),
        "empty": not answer,
        "cut": said["num_answer_tokens"] >= max_new_tokens,
        "as the reference": answer == row.messages[-1].content.strip(),
        "names a picture": IMAGE_PLACEHOLDER in answer,
        "of a video": bool(row.videos),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        left_out[reason] += 1
        return
    *asked, chosen = [{"role": message.role, "content": message.content} for message in row.messages]
    yield {
        "id": row.id,
        "messages": asked,
        "images": [_name(path, data_dir) for path in row.images],
        "chosen": chosen,
        "rejected": {"role": "assistant", "content": answer},
        **({} if row.label is None else {"label": row.label}),
    }


def _name(path: Path, data_dir: Path) -> str:
    folder = data_dir.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _counted(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "no answer"


def first_pairs(directory: Path, count: int = 8) -> Sequence[tuple[str, str, str]]:
    """The first pairs as rows of a table: id, reference, what the model said."""
    pairs = json.loads((directory / PAIRS_FILE).read_text(encoding="utf-8"))
    return [(pair["id"], pair["chosen"]["content"], pair["rejected"]["content"]) for pair in pairs[:count]]
