"""Which training rows a person should look at first: their labels or captions are not what models expect.

Rows with labels (few different answers) are judged by the probability of their label in classifiers that did not see
them, ranked by cleanlab; captions by their loss in models that did not see them, against the loss of rows that look
alike.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from mllm_assets.artifacts import (
    digest_json,
    is_sound,
    staged_directory,
    write_json_atomic,
    write_manifest,
)
from mllm_assets.data.curate.corrections import content_id
from mllm_assets.data.quality.store import QualityStore, table_for, utc_now
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import DataError, MachineError, RecipeError
from mllm_assets.layout import Layout

VERSION = 2  # of what is computed
ISSUES_FILE = "issues.json"
INSTALL = "pip install 'mllm-assets[labels]'"
MAX_LABELS = 50  # of more different answers each row's is a caption
MIN_ROWS_PER_LABEL = 5  # on average
NUM_SPREADS = 3  # above the others by so many spreads of the differences a caption's loss is notable
MAX_SHOWN_CHARS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelIssuesSpec:
    """How suspicious rows are found.

    Attributes:
        recipe: Trains on the dataset; its model looks at the pictures, and captions are learnt with its values.
        num_folds: The rows are asked about in so many parts, by what learnt from the others.
        max_steps: Of the training without each part, for captions.
    """

    recipe: str
    num_folds: int = 5
    max_steps: int = 200

    def __post_init__(self) -> None:
        if not 2 <= self.num_folds <= 100:
            raise RecipeError(f"label_issues: num_folds is {self.num_folds}: expected 2 to 100.")
        if self.max_steps < 1:
            raise RecipeError(f"label_issues: max_steps is {self.max_steps}: expected 1 or more.")


@dataclass(frozen=True, kw_only=True, slots=True)
class IssueRows:
    """The training rows that are looked at: one for each content.

    Attributes:
        answers: By id.
        groups: The group of near-duplicates of each id.
        copies: Changed copies in the training entry, with the id of what each was made from.
        labels: The different answers where they are labels; empty for captions.
    """

    answers: Mapping[str, str]
    groups: Mapping[str, str]
    copies: Mapping[str, str]
    labels: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Issue:
    """What is known of one row; `score` is 0 for the worst, to 1, of labels, and the excess of loss of captions."""

    sample_id: str
    score: float
    is_suspect: bool
    given: str
    suggested: str
    reason: str


def rows_of(dataset: Dataset, entries: Sequence[str], groups: Mapping[str, str]) -> IssueRows:
    """The rows of a dataset's training entries; `groups` are those of near-duplicates, by content.

    Raises:
        DataError: There are too few rows, or one has no picture.
    """
    answers: dict[str, str] = {}
    first: dict[str, str] = {}
    later: dict[str, str] = {}
    for name in entries:
        for row in dataset.entry(name).each():
            if not row.images:
                raise DataError(f"Row {row.id} of {name} has no picture, and label_issues looks at pictures.")
            content = content_id(row.id)
            if "+" in row.id or content in first:
                later[row.id] = content
                continue
            first[content] = row.id
            answers[row.id] = row.messages[-1].content
    copies = {copy: first[content] for copy, content in later.items() if content in first}
    if len(answers) < 2:
        raise DataError("label_issues compares rows with one another, and there are fewer than two.")
    kinds = Counter(answers.values())
    is_closed = 2 <= len(kinds) <= MAX_LABELS and len(answers) >= MIN_ROWS_PER_LABEL * len(kinds)
    return IssueRows(
        answers=answers,
        groups={row_id: groups.get(content, content) for content, row_id in first.items()},
        copies=copies,
        labels=sorted(kinds) if is_closed else (),
    )


def duplicate_groups(store: QualityStore, dataset: str) -> dict[str, str]:
    """The group of near-duplicates of each content that is trained on."""
    rows = store.query(
        "SELECT sample_id, duplicate_group FROM latest_splits WHERE dataset = $dataset AND duplicate_group IS NOT NULL",
        {"dataset": dataset},
    )
    return {content_id(row["sample_id"]): row["duplicate_group"] for row in rows}


def require_cleanlab() -> None:
    """Refuse to go on without what ranks labels.

    Raises:
        MachineError: Cleanlab is not installed.
    """
    try:
        import cleanlab.rank  # pyright: ignore[reportMissingImports]  # noqa: F401
    except ImportError:
        raise MachineError(f"label_issues ranks labels with cleanlab. Install what it needs with: {INSTALL}") from None


def label_issues(rows: IssueRows, probabilities: Mapping[str, Sequence[float]]) -> list[Issue]:
    """Rank rows by the probability of their label, out of fold; the most suspicious is first."""
    from cleanlab.filter import find_label_issues  # pyright: ignore[reportMissingImports]
    from cleanlab.rank import get_label_quality_scores  # pyright: ignore[reportMissingImports]

    ids, number = list(rows.answers), {label: place for place, label in enumerate(rows.labels)}
    given_N = np.array([number[rows.answers[row_id]] for row_id in ids])
    found_NC = np.array([probabilities[row_id] for row_id in ids])
    scores_N = get_label_quality_scores(given_N, found_NC, method="self_confidence")
    is_suspect_N = find_label_issues(given_N, found_NC, n_jobs=1)
    issues = []
    for place in np.argsort(scores_N, kind="stable").tolist():
        given, best = rows.answers[ids[place]], rows.labels[int(found_NC[place].argmax())]
        of_given, of_best = found_NC[place, given_N[place]], found_NC[place].max()
        says = f"{_short(best)!r} is likelier by its picture ({of_best:.2f} against {of_given:.2f})"
        issues.append(
            Issue(
                sample_id=ids[place],
                score=float(scores_N[place]),
                is_suspect=bool(is_suspect_N[place]),
                given=given,
                suggested=best if best != given else "",
                reason=says if best != given else f"the likeliest by its picture too ({of_given:.2f})",
            )
        )
    return issues


def caption_issues(
    rows: IssueRows, losses: Mapping[str, float], neighbours: Mapping[str, Sequence[str]]
) -> list[Issue]:
    """Rank rows by how far their loss, out of fold, is above the mean of those that look alike; the worst is first."""
    ids = list(rows.answers)
    usual_N = np.array([np.mean([losses[other] for other in neighbours[row_id]]) for row_id in ids])
    excess_N = np.array([losses[row_id] for row_id in ids]) - usual_N
    middle = float(np.median(excess_N))
    spread = 1.4826 * float(np.median(np.abs(excess_N - middle)))  # of normally distributed values the deviation
    return [
        Issue(
            sample_id=ids[place],
            score=float(excess_N[place]),
            is_suspect=bool(excess_N[place] > middle + NUM_SPREADS * spread),
            given=rows.answers[ids[place]],
            suggested="",
            reason=f"loss {losses[ids[place]]:.2f} nats a token, of those that look most alike {usual_N[place]:.2f}",
        )
        for place in np.argsort(-excess_N, kind="stable").tolist()
    ]


def publish_issues(
    directory: Path, issues: Sequence[Issue], *, dataset: str, recipe: str, store: QualityStore, run_id: str
) -> None:
    """Write the ranking to its folder and to DuckDB, where reviewing begins with it."""
    digest = digest_json([asdict(issue) for issue in issues])
    assert all(math.isfinite(issue.score) for issue in issues)
    if not is_sound(directory):
        with staged_directory(directory) as staging:
            _write(staging, issues, digest, dataset=dataset, recipe=recipe)
    store.write({"label_issues": table_of(issues, directory.name, dataset=dataset, recipe=recipe, run_id=run_id)})


def _write(staging: Path, issues: Sequence[Issue], digest: str, *, dataset: str, recipe: str) -> None:
    write_json_atomic(staging / ISSUES_FILE, [asdict(issue) for issue in issues])
    payload = {"dataset": dataset, "recipe": recipe, "digest": digest, "num_rows": len(issues)}
    write_manifest(staging, {**payload, "num_suspect": sum(issue.is_suspect for issue in issues)})


def table_of(issues: Sequence[Issue], digest: str, *, dataset: str, recipe: str, run_id: str) -> pa.Table:
    """The ranking as rows of DuckDB."""
    shared = {
        "dataset": dataset, "issues_digest": digest, "recipe": recipe, "run_id": run_id, "written_at": utc_now()
    }  # fmt: skip
    return table_for(
        "label_issues",
        [{**asdict(issue), **shared, "position": place} for place, issue in enumerate(issues, start=1)],
    )


def issues_directory(layout: Layout, recipe: str, identity: object) -> Path:
    """Where the ranking goes, named by all that it depends on."""
    return layout.outputs / recipe / "label_issues" / digest_json([VERSION, identity])[:16]


def read_issues(directory: Path) -> list[Issue]:
    """What `publish_issues` wrote."""
    return [Issue(**one) for one in json.loads((directory / ISSUES_FILE).read_text(encoding="utf-8"))]


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 1]}…"
