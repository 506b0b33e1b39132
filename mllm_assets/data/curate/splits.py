"""Write the splits, train, val and test: ShareGPT rows, content-addressed images, a manifest, a swapped link.

Only ids, digests and looks of samples are in memory, as arrays; rows are spooled to disk until their order is known.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mllm_assets.artifacts import (
    digest_json,
    point_symlink,
    publish,
    read_manifest,
    staging_directory,
    write_manifest,
)
from mllm_assets.data.curate.assign import (
    NONE,
    SPLITS,
    UNUSED,
    UNUSED_REASONS,
    Assignments,
    assign,
    assign_as_given,
    membership,
    sides_before,
    without,
)
from mllm_assets.data.curate.augment import LEFT_OUT, MATCHES, Forbidden, augmented_copies
from mllm_assets.data.curate.corrected import CorrectedSource
from mllm_assets.data.curate.corrections import DROP, RELABEL
from mllm_assets.data.curate.publish import ImageWriter, build_row, image_number, side_files, split_file
from mllm_assets.data.curate.sample_page import SamplePage
from mllm_assets.data.ingest.raw_files import index_images
from mllm_assets.data.ingest.spec import DatasetSpec, as_json
from mllm_assets.data.ingest.split_spec import SIDES, TEST, TRAIN, VAL
from mllm_assets.data.quality.groups import QUALITY_FILE, SampleGroups, group_samples, read_perceptual_hashes
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.sharegpt.dataset import IMAGE_LIST
from mllm_assets.data.sharegpt.row_files import write_rows
from mllm_assets.errors import IntegrityError
from mllm_assets.file_digests import FileDigests
from mllm_assets.layout import Layout
from mllm_assets.progress import doing, followed

COLUMNS = ("sample_id", "row_index", "source_split", "reject_reason", "flags", "duplicate_group")


class RowSpool:
    """Rows by number in a file: added in any order, each number once, and read back by it.

    A row takes 16 bytes of memory. Several spools may share a file.
    """

    def __init__(self, file: IO[bytes], num_rows: int) -> None:
        self._file = file
        self._starts = np.zeros(num_rows, np.int64)
        self._lengths = np.zeros(num_rows, np.int64)

    def add(self, number: int, row: dict[str, Any]) -> None:
        content = orjson.dumps(row)
        self._starts[number], self._lengths[number] = self._file.tell(), len(content)
        self._file.write(content)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._file.flush()
        for number in np.flatnonzero(self._lengths).tolist():
            content = os.pread(self._file.fileno(), int(self._lengths[number]), int(self._starts[number]))
            yield orjson.loads(content)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitResult:
    """A version of a dataset: num_raw = num_train + num_val + num_test + num_unused + num_rejected.

    The training file holds num_augmented rows more, which come from training samples. In num_corrected rows a person
    gave the answer. Where no sample tests, there is no test file, and `test_digest` is empty.
    """

    directory: Path
    digest: str
    train_digest: str
    val_digest: str
    test_digest: str
    num_raw: int
    num_train: int
    num_val: int
    num_test: int
    num_unused: int
    num_rejected: int
    num_augmented: int
    num_corrected: int
    unused_reasons: dict[str, int]
    reject_reasons: dict[str, int]
    augmentations: dict[str, int]

    @property
    def copies_left_out(self) -> dict[str, int]:
        """Copies that were not made because the row's words name what the operation changes, by operation and what."""
        return {fate: number for fate, number in self.augmentations.items() if LEFT_OUT in fate}


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeVersion:
    """A published version, and where each of its samples and changed copies went."""

    result: SplitResult
    assignments: Assignments
    samples: pa.Table
    fates: list[tuple[str, str]]


@doing("split samples")
def split(
    spec: DatasetSpec, layout: Layout, raw: Path, quality: Path, run_id: str, corrections: Path | None = None
) -> SplitResult:
    """Split by duplicate group and publish `data/.versions/<dataset>/<digest>/`, with `data/<dataset>` pointing to it.

    `quality` is the assessment of the ingested source `raw`; `split_membership` records `run_id` with every sample.
    `corrections` is what `settle` published: it changes answers and takes samples out, and moves none across.

    Raises:
        IntegrityError: `raw`, `quality` or `corrections` was never finished, or they do not belong together.
        DataError: Fewer than two samples are usable, or all of a side were dropped.
    """
    made = make_version(spec, layout, raw, quality, corrections)
    point_symlink(layout.data / spec.name, made.result.directory)
    with doing("write the quality database"):
        rows = membership(spec, made.result.digest, made.assignments, made.samples, made.fates, run_id)
        QualityStore(layout.quality_db).write({"split_membership": rows})
    return made.result


def make_version(
    spec: DatasetSpec, layout: Layout, raw: Path, quality: Path, corrections: Path | None = None
) -> MadeVersion:
    """What `split` publishes, without making it the dataset's; raises as that."""
    source, assessment = read_manifest(raw), read_manifest(quality)
    if source["digest"] != assessment["raw_digest"]:
        raise IntegrityError(
            f"{quality} assesses the source {assessment['raw_digest']}, but {raw} was ingested since. Materialise "
            f"{spec.name}/sample_quality again."
        )
    store = QualityStore(layout.quality_db)
    rows = CorrectedSource(spec, raw, corrections)
    samples = _without_made_up(pq.read_table(quality / QUALITY_FILE, columns=list(COLUMNS)), rows)
    decided = rows.actions(samples["sample_id"].to_pylist())
    assignments = without(_assign(spec, store, samples, raw, quality), decided == DROP, spec.name)
    images = ImageWriter(spec, layout)
    with staging_directory(layout.version(spec.name, "new").parent) as staging:
        page = SamplePage(staging, assignments, samples)
        fates = _write_sides(spec, images, rows, quality, assignments, staging, page)
        images.write_list(staging / IMAGE_LIST)
        del images  # frees its digests: DuckDB needs the memory next
        read = FileDigests()  # each file is read once, for the version's name and its manifest
        digests = {side: read.of(path)[:16] for side, path in side_files(staging, spec.output.format).items()}
        digest = digest_json([*digests.values(), read.of(staging / IMAGE_LIST)])[:16]
        result = SplitResult(
            directory=layout.version(spec.name, digest),
            digest=digest,
            train_digest=digests[TRAIN],
            val_digest=digests[VAL],
            test_digest=digests.get(TEST, ""),
            num_raw=len(samples),
            num_train=int(assignments.of(TRAIN).sum()),
            num_val=int(assignments.of(VAL).sum()),
            num_test=int(assignments.of(TEST).sum()),
            num_unused=int(assignments.of(UNUSED).sum()),
            num_rejected=len(samples) - samples["reject_reason"].null_count,
            num_augmented=sum(fate not in MATCHES and LEFT_OUT not in fate for _, fate in fates),
            num_corrected=int(((decided == RELABEL) & (assignments.positions_S != NONE)).sum()),
            unused_reasons=_unused_reasons(assignments),
            reject_reasons=_reject_reasons(samples),
            augmentations=dict(sorted(Counter(fate for _, fate in fates).items())),
        )
        write_manifest(staging, _manifest(spec, result, assessment), digest=read.of)
        publish(staging, result.directory)
        page.write(result.directory, quality, dataset=spec.name)
    pa.default_memory_pool().release_unused()
    return MadeVersion(result=result, assignments=assignments, samples=samples, fates=fates)


def _without_made_up(samples: pa.Table, rows: CorrectedSource) -> pa.Table:
    """The verdicts without those that a new answer makes up for, such as a missing label's."""
    verdicts = zip(samples["sample_id"].to_pylist(), samples["reject_reason"].to_pylist(), strict=True)
    reasons = [None if reason and rows.makes_up_for(name, reason) else reason for name, reason in verdicts]
    number = samples.schema.get_field_index("reject_reason")
    return samples.set_column(number, "reject_reason", pa.array(reasons, pa.string()))


def _manifest(spec: DatasetSpec, result: SplitResult, assessment: Mapping[str, Any]) -> dict[str, Any]:
    manifest = {
        "kind": "split",
        "dataset": spec.name,
        "quality_digest": assessment["digest"],
        "raw_digest": assessment["raw_digest"],
        "spec": as_json(spec),
        **asdict(result),
    }
    del manifest["directory"]
    return manifest


def no_test_text(spec: DatasetSpec, num_unused: int) -> str:
    """What to say of a dataset without test samples."""
    cure = f"put `num_test: {max(1, spec.split.num_val)}` below `split:` in its defs.yaml, which splits it again"
    if spec.source.split_column is not None:
        why, cure = "no row is marked so", f"write test into the column {spec.source.split_column} of some rows"
    elif spec.source.is_split:
        why, cure = "its source gives none", "name its part for it as `test_split:` below `source:` in its defs.yaml"
    elif spec.split.num_test == 0:
        why = "split.num_test is 0"
    else:
        why = f"of its samples {num_unused} neither train nor validate, which is too few"
    return (
        f"{spec.name} has no test split: {why}. Releases are judged on {spec.val_entry} then, which also chose, and "
        f"their model cards say so. To have one, {cure}."
    )


def _assign(spec: DatasetSpec, store: QualityStore, samples: pa.Table, raw: Path, quality: Path) -> Assignments:
    if spec.split_is_given:
        return assign_as_given(spec, samples, read_manifest(raw)["num_source_rows"])
    index, hashes = index_images(raw), read_perceptual_hashes(quality)

    def regroup(chosen_S: NDArray[np.bool_]) -> SampleGroups:
        return group_samples(index, hashes, chosen_S, spec.quality)

    return assign(
        np.array(samples["sample_id"].to_pylist(), "S"),
        samples["reject_reason"].is_null().to_numpy(),
        regroup,
        spec.split,
        sides_before(store, spec, samples["sample_id"]),
    )


def _write_sides(
    spec: DatasetSpec,
    images: ImageWriter,
    rows: CorrectedSource,
    quality: Path,
    assignments: Assignments,
    staging: Path,
    page: SamplePage,
) -> list[tuple[str, str]]:
    """Write the images and all sides' rows; returns what `_spool_copies` does."""
    sizes = {side: int(assignments.positions_S[assignments.of(side)].max(initial=NONE)) + 1 for side in SIDES}
    num_copies = sizes[TRAIN] * len(spec.augment)  # after all samples
    with TemporaryFile(dir=staging) as file:
        spools = {side: RowSpool(file, size + num_copies * (side == TRAIN)) for side, size in sizes.items()}
        _spool_rows(spec, images, rows, assignments, spools, page)
        fates = _spool_copies(spec, images, rows, quality, assignments, spools[TRAIN], sizes[TRAIN])
        for side, spool in spools.items():
            if side == TEST and not sizes[side]:
                continue
            write_rows(staging / split_file(side, spec.output.format), spool, spec.output.format)
    return fates


def _spool_rows(
    spec: DatasetSpec,
    images: ImageWriter,
    rows: CorrectedSource,
    assignments: Assignments,
    spools: Mapping[str, RowSpool],
    page: SamplePage,
) -> None:
    """Publish the images of used samples and build their rows; all samples come on the page."""
    places = zip(assignments.splits_S.tolist(), assignments.positions_S.tolist(), strict=True)
    samples = followed(zip(rows, places, strict=True), "write rows", len(assignments.splits_S))
    for sample, (number, position) in samples:
        if position == NONE:
            page.add(sample, None)
            continue
        side = SPLITS[number]
        paths = [
            images.write(data, source_id, image_number(side, position, index))
            for index, (source_id, data) in enumerate(zip(sample["image_ids"], sample["images"], strict=True))
        ]
        row = build_row(spec, sample, position, paths)
        spools[side].add(position, row)
        page.add(sample, row)


def _spool_copies(
    spec: DatasetSpec,
    images: ImageWriter,
    rows: CorrectedSource,
    quality: Path,
    assignments: Assignments,
    spool: RowSpool,
    first: int,
) -> list[tuple[str, str]]:
    """Spool changed copies of training samples from number `first` on.

    Returns:
        Each copy's id, and its operation or why it was left out.
    """
    if not spec.augment:
        return []
    index, hashes = index_images(rows.raw), read_perceptual_hashes(quality)
    forbidden = {}
    for side in (VAL, TEST):
        held_out = np.unique(index.uses_T[np.repeat(assignments.of(side), np.diff(index.offsets_S1))])
        forbidden[side] = Forbidden(hashes.phash_U[held_out], hashes.colors_UC[held_out], spec.quality)
    positions = np.where(assignments.of(TRAIN), assignments.positions_S, NONE)
    fates = []
    for copy in augmented_copies(spec, images, rows, positions, forbidden):
        if copy.row is not None:
            spool.add(first + copy.number, copy.row)
        fates.append((copy.sample_id, copy.fate))
    return fates


def _unused_reasons(assignments: Assignments) -> dict[str, int]:
    counts = np.bincount(assignments.reasons_S[assignments.of(UNUSED)], minlength=len(UNUSED_REASONS)).tolist()
    return {reason: count for reason, count in sorted(zip(UNUSED_REASONS, counts, strict=True)) if count}


def _reject_reasons(samples: pa.Table) -> dict[str, int]:
    counted = samples["reject_reason"].drop_null().value_counts().to_pylist()
    return dict(sorted((row["values"], row["counts"]) for row in counted))
