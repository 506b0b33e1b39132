"""Pages of a dataset's samples, filtered and searched: how each was judged, where it went, what models say."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mllm_assets.data.ingest.images import EXTENSIONS
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.quality.views import IS_RIGHT
from mllm_assets.errors import DataError, did_you_mean
from mllm_assets.layout import Layout

PAGE_SIZE = 24
MAX_TEXT_CHARS = 2000  # of one text that a page shows
SPLITS = ("train", "val", "test", "unused", "rejected")
FLAGGED = "(any flag)"
# what a person may order by; each ends with what makes the order unique
ORDERS = {
    "as in the source": "row_index, sample_id",
    "most suspicious first": "suspicion NULLS LAST, row_index, sample_id",
    "highest loss first": "loss_nats DESC NULLS LAST, row_index, sample_id",
    "lowest loss first": "loss_nats NULLS LAST, row_index, sample_id",
    "longest text first": "length(text) DESC NULLS LAST, row_index, sample_id",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleQuery:
    """Which samples of a dataset, and which page of them, from 1.

    Attributes:
        text: What text, label, location, id or an answer must contain; case does not count.
        split: One of `SPLITS`, or "" for all.
        flag: A quality flag or reason of rejection, `FLAGGED` for any, or "" for all.
        recipe: Whose model's losses and answers are shown, or "".
        answers: Only those that it answered rightly, or the others that it was asked.
    """

    dataset: str
    text: str = ""
    split: str = ""
    flag: str = ""
    recipe: str = ""
    answers: Literal["", "right", "wrong"] = ""
    order: str = "as in the source"
    page: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenSample:
    """A sample as a page shows it; what is not known is None or empty.

    `is_right` is None where another answer than the reference need not be wrong: where there is no label. `issue` is
    what `label_issues` says of it, `suggested` the label that it finds likelier.
    """

    sample_id: str
    location: str | None
    text: str
    label: str | None
    split: str | None
    flags: tuple[str, ...]
    reason: str | None
    loss_nats: float | None
    base_loss_nats: float | None
    answer: str | None
    base_answer: str | None
    is_right: bool | None
    image: Path | None
    is_suspect: bool = False
    suggested: str = ""
    issue: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePage:
    """One page of a query, and how many samples match it."""

    samples: Sequence[SeenSample]
    num_matching: int

    @property
    def num_pages(self) -> int:
        return max(1, -(-self.num_matching // PAGE_SIZE))


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What a dataset's samples can be filtered by."""

    flags: Sequence[str]
    recipes: Sequence[str]


_MATCHING = f"""
    WITH said AS (
        SELECT sample_id, any_value(loss_nats) FILTER (model = 'tuned') AS loss_nats,
            any_value(loss_nats) FILTER (model = 'base') AS base_loss_nats,
            any_value(answer) FILTER (model = 'tuned') AS answer,
            any_value(answer) FILTER (model = 'base') AS base_answer,
            any_value({IS_RIGHT}) FILTER (model = 'tuned') AS is_right
        FROM latest_predictions WHERE recipe = $recipe GROUP BY sample_id),
    found AS (
        SELECT v.sample_id, v.row_index, v.source_location, v.flags, v.reject_reason, s.caption AS text, s.label,
            CASE WHEN v.reject_reason IS NOT NULL THEN 'rejected' ELSE m.split END AS split,
            coalesce(v.reject_reason, m.reason) AS reason, issues.position AS suspicion, issues.is_suspect,
            issues.suggested, issues.reason AS issue,
            said.* EXCLUDE sample_id
        FROM latest_verdicts v JOIN samples s USING (dataset, sample_id)
        LEFT JOIN latest_splits m ON (m.dataset, m.sample_id) = (v.dataset, v.sample_id)
        LEFT JOIN latest_label_issues issues ON (issues.dataset, issues.sample_id) = (v.dataset, v.sample_id)
        LEFT JOIN said ON said.sample_id = v.sample_id
        WHERE v.dataset = $dataset)
    SELECT {{what}} FROM found
    WHERE ($split = '' OR split = $split)
        AND ($flag = '' OR reject_reason = $flag OR list_contains(flags, $flag)
            OR ($flag = $flagged AND len(flags) > 0))
        AND ($answers = '' OR (answer IS NOT NULL AND (is_right IS true) = ($answers = 'right')))
        AND ($text = '' OR contains(lower(concat_ws(chr(10), text, label, source_location, sample_id, answer)),
            lower($text)))"""


def assessed_datasets(layout: Layout) -> list[str]:
    """The datasets that DuckDB knows, the last assessed first."""
    if not layout.quality_db.exists():
        return []
    rows = QualityStore(layout.quality_db).query(
        "SELECT dataset FROM assessments GROUP BY dataset ORDER BY max(written_at) DESC, dataset"
    )
    return [row["dataset"] for row in rows]


def choices(layout: Layout, dataset: str) -> Choices:
    """The flags and reasons that a dataset's samples have, and the recipes whose models were asked about some."""
    store = QualityStore(layout.quality_db)
    flags = store.query(
        "SELECT DISTINCT flag FROM (SELECT unnest(flags) AS flag FROM latest_verdicts WHERE dataset = $dataset "
        "UNION ALL SELECT reject_reason FROM latest_verdicts WHERE dataset = $dataset) WHERE flag IS NOT NULL "
        "ORDER BY flag LIMIT 100",
        {"dataset": dataset},
    )
    recipes = store.query(
        "SELECT DISTINCT recipe FROM latest_predictions JOIN samples USING (sample_id) WHERE dataset = $dataset "
        "ORDER BY recipe LIMIT 100",
        {"dataset": dataset},
    )
    return Choices(flags=[row["flag"] for row in flags], recipes=[row["recipe"] for row in recipes])


def browse(layout: Layout, query: SampleQuery) -> SamplePage:
    """Read one page; memory does not grow with the dataset.

    Raises:
        DataError: The dataset was not assessed, or it cannot be ordered so.
    """
    if query.order not in ORDERS:
        raise DataError(f"Samples cannot be ordered {query.order!r}: expected one of {', '.join(ORDERS)}.")
    if query.dataset not in (known := assessed_datasets(layout)):
        hint = did_you_mean(query.dataset, known)
        raise DataError(f"{query.dataset} was not assessed yet. {hint}To make a dataset: mllm-assets run DATASET")
    store = QualityStore(layout.quality_db)
    names = ("dataset", "text", "split", "flag", "recipe", "answers")
    params: dict[str, Any] = {name: getattr(query, name) for name in names} | {"flagged": FLAGGED}
    [count] = store.query(_MATCHING.format(what="count(*) AS number"), params)
    offset = PAGE_SIZE * (max(1, query.page) - 1)
    # ids alone are sorted: with their texts, the last pages of 50,000 samples took more than the database may
    ordered = f"ORDER BY {ORDERS[query.order]} LIMIT {PAGE_SIZE} OFFSET {offset:d}"
    ids = [row["sample_id"] for row in store.query(f"{_MATCHING.format(what='sample_id')} {ordered}", params)]
    found = store.query(f"{_MATCHING.format(what='*')} AND list_contains($ids, sample_id)", params | {"ids": ids})
    rows, images = {row["sample_id"]: row for row in found}, _images(store, query.dataset, ids)
    samples = [_seen(rows[name], published_image(layout, images.get(name))) for name in ids if name in rows]
    return SamplePage(samples=samples, num_matching=count["number"])


def _images(store: QualityStore, dataset: str, sample_ids: Sequence[str]) -> dict[str, str]:
    """The first image of each sample, by its digest."""
    rows = store.query(
        "SELECT sample_id, image_sha256 FROM images WHERE dataset = $dataset AND image_index = 0 "
        "AND list_contains($ids, sample_id)",
        {"dataset": dataset, "ids": list(sample_ids)},
    )
    return {row["sample_id"]: row["image_sha256"] for row in rows}


def published_image(layout: Layout, digest: str | None) -> Path | None:
    """The file of an image that was published as it is; of a rejected one there is none."""
    if not digest:
        return None
    paths = (layout.images / f"{digest[:16]}.{extension}" for extension in EXTENSIONS.values())
    return next((path for path in paths if path.is_file()), None)


def _seen(row: dict[str, Any], image: Path | None) -> SeenSample:
    def cut(text: str | None) -> str | None:
        return text if text is None or len(text) <= MAX_TEXT_CHARS else f"{text[: MAX_TEXT_CHARS - 1]}…"

    return SeenSample(
        sample_id=row["sample_id"],
        location=cut(row["source_location"]),
        text=cut(row["text"]) or "",
        label=cut(row["label"]),
        split=row["split"],
        flags=tuple(row["flags"] or ()),
        reason=row["reason"],
        loss_nats=row["loss_nats"],
        base_loss_nats=row["base_loss_nats"],
        answer=cut(row["answer"]),
        base_answer=cut(row["base_answer"]),
        is_right=row["is_right"],
        image=image,
        is_suspect=bool(row["is_suspect"]),
        suggested=cut(row["suggested"]) or "",
        issue=cut(row["issue"]) or "",
    )
