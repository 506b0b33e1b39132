"""What a person reviews: a dataset's samples with the answer that each has, and what was decided about it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.artifacts import is_complete, read_manifest
from mllm_assets.data.curate.corrected import COLUMNS, answer_of, find_source
from mllm_assets.data.curate.corrections import (
    RELABEL,
    UNDO,
    Action,
    Correction,
    content_id,
    in_force,
    read_corrections,
)
from mllm_assets.data.curate.publish import side_files
from mllm_assets.data.ingest.raw_files import read_texts
from mllm_assets.data.quality.browse import SampleQuery, SeenSample, browse, published_image
from mllm_assets.data.sharegpt.row_files import read_rows
from mllm_assets.errors import DataError
from mllm_assets.layout import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSample:
    """A sample's content: its id, and its answer and first picture in the source; "" where it has none."""

    sample_id: str
    answer: str
    location: str
    image_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReviewedSample:
    """A sample as a page shows it, its answer in the source, and what a person decided about it."""

    seen: SeenSample
    answer: str
    decision: Correction | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReviewPage:
    """One page of a query."""

    samples: Sequence[ReviewedSample]
    num_matching: int
    num_pages: int


def source_samples(layout: Layout, dataset: str) -> Iterator[SourceSample]:
    """Each content of a dataset's source once.

    Raises:
        DataError: The dataset was never made.
    """
    spec, raw = find_source(layout, dataset)
    seen = set()
    for row in read_texts(raw, COLUMNS):
        if (sample_id := content_id(row["sample_id"])) not in seen:
            seen.add(sample_id)
            yield SourceSample(
                sample_id=sample_id,
                answer=answer_of(row, spec),
                location=row["source_location"],
                image_id=next(iter(row["image_ids"]), ""),
            )


def answers(layout: Layout, dataset: str, sample_ids: Collection[str]) -> dict[str, str]:
    """The answers of some contents in the source; those that it does not have are missing. Raises as above."""
    wanted = set(sample_ids)
    return {one.sample_id: one.answer for one in source_samples(layout, dataset) if one.sample_id in wanted}


def review_page(layout: Layout, query: SampleQuery) -> ReviewPage:
    """A page of samples.

    Raises:
        DataError: The dataset was never made or assessed.
        IntegrityError: The file of decisions is damaged.
    """
    page = browse(layout, query)
    ids = {seen.sample_id: content_id(seen.sample_id) for seen in page.samples}
    known, decided = answers(layout, query.dataset, ids.values()), decisions(layout, query.dataset)
    samples = [
        ReviewedSample(seen=seen, answer=known.get(ids[seen.sample_id], ""), decision=decided.get(ids[seen.sample_id]))
        for seen in page.samples
    ]
    return ReviewPage(samples=samples, num_matching=page.num_matching, num_pages=page.num_pages)


def decisions(layout: Layout, dataset: str) -> dict[str, Correction]:
    """What is decided about each content, see `in_force`."""
    return in_force(read_corrections(layout, dataset))


def proposed(
    layout: Layout, dataset: str, action: Action, sample_ids: Sequence[str], *, new: str = "", who: str, why: str = ""
) -> list[Correction]:
    """Decisions about samples as they are in the source, to be recorded.

    Raises:
        DataError: A sample is not in it, or has this answer already.
        RecipeError: Who decides is not said.
    """
    ids = list(dict.fromkeys(map(content_id, sample_ids)))
    known = answers(layout, dataset, ids)
    missing = [sample_id for sample_id in ids if sample_id not in known]
    if missing and action != UNDO:  # of a sample that is gone a decision can still be taken back
        raise DataError(f"{dataset} has no sample {missing[0]}. See them: mllm-assets review {dataset} list")
    if action == RELABEL and (same := [one for one in ids if known[one] == new]):
        raise DataError(f"{same[0]} has the answer {new!r} in its source already. keep says that it is right.")
    return [Correction(sample_id=one, action=action, old=known.get(one, ""), new=new, who=who, why=why) for one in ids]


def pictures(layout: Layout, dataset: str, samples: Mapping[str, str]) -> dict[str, Path]:
    """The published file of each content's first picture; `samples` are those pictures' digests."""
    found = {}
    version = layout.data / dataset
    if is_complete(version):
        files = side_files(version, read_manifest(version)["spec"]["output"]["format"])
        for row in (row for path in files.values() for row in read_rows(path)):
            if row["images"]:
                found[content_id(row["id"])] = layout.data / row["images"][0]
    for sample_id, image_id in samples.items():
        if sample_id not in found and (path := published_image(layout, image_id)):
            found[sample_id] = path
    return found
