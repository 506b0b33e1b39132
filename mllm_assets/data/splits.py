"""Write the training and validation splits: ShareGPT rows, content-addressed images, a manifest, a swapped link.

What is held in memory for a sample are its id, digests and looks as arrays; rows wait on the disk for their order.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mllm_assets.artifacts import (
    digest_json,
    point_symlink,
    publish,
    read_manifest,
    sha256_file,
    staging_directory,
    write_manifest,
)
from mllm_assets.data.assign import NONE, SPLITS, TRAIN, UNUSED, UNUSED_REASONS, VAL, Assignments, assign
from mllm_assets.data.augment import Forbidden, augmented_copies
from mllm_assets.data.fixed_splits import assign_as_given
from mllm_assets.data.membership import AUGMENTED, membership, sides_before
from mllm_assets.data.publish import IMAGE_LIST, ImageWriter, build_row, image_number
from mllm_assets.data.raw_files import index_images
from mllm_assets.data.row_files import write_rows
from mllm_assets.data.row_spool import Joined, RowSpool
from mllm_assets.data.sources import read_raw
from mllm_assets.data.spec import DatasetSpec, as_json
from mllm_assets.errors import IntegrityError
from mllm_assets.layout import Layout
from mllm_assets.quality.files import QUALITY_FILE
from mllm_assets.quality.groups import SampleGroups, group_samples, read_looks
from mllm_assets.quality.store import QualityStore

SIDES = (TRAIN, VAL)
COLUMNS = ("sample_id", "row_index", "source_split", "reject_reason", "duplicate_group")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitResult:
    """A version of a dataset: num_raw = num_train + num_val + num_unused + num_rejected.

    The training file holds num_augmented rows more, which come from training samples.
    """

    directory: Path
    digest: str
    train_digest: str
    val_digest: str
    num_raw: int
    num_train: int
    num_val: int
    num_unused: int
    num_rejected: int
    num_augmented: int
    unused_reasons: dict[str, int]
    reject_reasons: dict[str, int]
    augmentations: dict[str, int]


def split(spec: DatasetSpec, layout: Layout, raw: Path, quality: Path, run_id: str) -> SplitResult:
    """Split by duplicate group and publish `data/.versions/<dataset>/<digest>/`, with `data/<dataset>` pointing to it.

    Args:
        spec: Sizes, seed, prompts and answer.
        layout: The project's folders.
        raw: The ingested source.
        quality: The assessment of that source.
        run_id: Recorded beside every sample in `split_membership`.

    Raises:
        IntegrityError: `raw` or `quality` was never finished, or they do not belong together.
        DataError: Fewer than two samples are usable.
    """
    source, assessment = read_manifest(raw), read_manifest(quality)
    if source["digest"] != assessment["raw_digest"]:
        raise IntegrityError(
            f"{quality} assesses the source {assessment['raw_digest']}, but {raw} was ingested since. Materialise "
            f"{spec.name}/sample_quality again."
        )
    store = QualityStore(layout.quality_db)
    samples = pq.read_table(quality / QUALITY_FILE, columns=list(COLUMNS))
    if spec.split_is_given:
        assignments = assign_as_given(spec, samples, source["num_source_rows"])
    else:
        assignments = _assign(spec, store, samples, raw, quality)
    images = ImageWriter(spec, layout)
    with staging_directory(layout.version(spec.name, "new").parent) as staging:
        with _spools(staging, assignments, len(spec.augment)) as spools:
            _spool_rows(spec, images, raw, assignments, spools)
            fates = _spool_copies(spec, images, raw, assignments, quality, spools[AUGMENTED])
            contents = {TRAIN: Joined([spools[TRAIN], spools[AUGMENTED]]), VAL: spools[VAL]}
            for side, rows in contents.items():
                write_rows(staging / split_file(side, spec.output.format), rows, spec.output.format)
            counts = {f"num_{name}": len(spool) for name, spool in spools.items()}
        images.write_list(staging / IMAGE_LIST)
        del images  # the digests of all: DuckDB has the memory next
        digests = {side: sha256_file(staging / split_file(side, spec.output.format))[:16] for side in SIDES}
        digest = digest_json([digests[TRAIN], digests[VAL], sha256_file(staging / IMAGE_LIST)])[:16]
        result = SplitResult(
            directory=layout.version(spec.name, digest),
            digest=digest,
            train_digest=digests[TRAIN],
            val_digest=digests[VAL],
            num_raw=len(samples),
            num_unused=int(assignments.of(UNUSED).sum()),
            num_rejected=len(samples) - samples["reject_reason"].null_count,
            unused_reasons=_unused_reasons(assignments),
            reject_reasons=_reject_reasons(samples),
            augmentations=dict(sorted(Counter(fate for _, fate in fates).items())),
            **counts,
        )
        _publish(spec, layout, staging, result, assessment)
    pa.default_memory_pool().release_unused()
    store.write({"split_membership": membership(spec, digest, assignments, samples, fates, run_id)})
    return result


def split_file(side: str, format: str) -> str:
    """The name of a side's file in a version: `train.json`."""
    return f"{side}.{format}"


def _assign(spec: DatasetSpec, store: QualityStore, samples: pa.Table, raw: Path, quality: Path) -> Assignments:
    index, looks = index_images(raw), read_looks(quality)

    def regroup(chosen_S: NDArray[np.bool_]) -> SampleGroups:
        return group_samples(index, looks, chosen_S, spec.quality)

    return assign(
        np.array(samples["sample_id"].to_pylist(), "S"),
        samples["reject_reason"].is_null().to_numpy(),
        regroup,
        spec.split,
        sides_before(store, spec, samples["sample_id"]),
    )


@contextmanager
def _spools(staging: Path, assignments: Assignments, num_operations: int) -> Iterator[dict[str, RowSpool]]:
    """For the rows of each side and the augmented ones; the files are gone afterwards."""
    sizes = {side: int(assignments.positions_S[assignments.of(side)].max(initial=NONE)) + 1 for side in SIDES}
    sizes[AUGMENTED] = sizes[TRAIN] * num_operations
    with ExitStack() as stack:
        yield {name: stack.enter_context(RowSpool(staging / f".{name}.rows", size)) for name, size in sizes.items()}


def _spool_rows(
    spec: DatasetSpec, images: ImageWriter, raw: Path, assignments: Assignments, spools: Mapping[str, RowSpool]
) -> None:
    """Publish the images of used samples and build their rows."""
    places = zip(assignments.splits_S.tolist(), assignments.positions_S.tolist(), strict=True)
    for sample, (number, position) in zip(read_raw(raw), places, strict=True):
        if position == NONE:
            continue
        side = SPLITS[number]
        paths = [
            images.write(data, source_id, image_number(side, position, index))
            for index, (source_id, data) in enumerate(zip(sample["image_ids"], sample["images"], strict=True))
        ]
        spools[side].add(position, build_row(spec, sample, position, paths))


def _spool_copies(
    spec: DatasetSpec,
    images: ImageWriter,
    raw: Path,
    assignments: Assignments,
    quality: Path,
    spool: RowSpool,
) -> list[tuple[str, str]]:
    """Changed copies of training samples: the ids of all, and what became of them."""
    if not spec.augment:
        return []
    index, looks = index_images(raw), read_looks(quality)
    uses = np.repeat(assignments.of(VAL), np.diff(index.offsets_S1))
    validating = np.unique(index.uses_T[uses])
    forbidden = Forbidden(looks.phash_U[validating], looks.colors_UC[validating], spec.quality)
    positions = np.where(assignments.of(TRAIN), assignments.positions_S, NONE)
    fates = []
    for copy in augmented_copies(spec, images, raw, positions, forbidden):
        if copy.row is not None:
            spool.add(copy.number, copy.row)
        fates.append((copy.sample_id, copy.operation if copy.row is not None else "augmentation_matches_val"))
    return fates


def _unused_reasons(assignments: Assignments) -> dict[str, int]:
    counts = np.bincount(assignments.reasons_S[assignments.of(UNUSED)], minlength=len(UNUSED_REASONS)).tolist()
    return {reason: count for reason, count in sorted(zip(UNUSED_REASONS, counts, strict=True)) if count}


def _reject_reasons(samples: pa.Table) -> dict[str, int]:
    counted = samples["reject_reason"].drop_null().value_counts().to_pylist()
    return dict(sorted((row["values"], row["counts"]) for row in counted))


def _publish(
    spec: DatasetSpec,
    layout: Layout,
    staging: Path,
    result: SplitResult,
    assessment: Mapping[str, object],
) -> None:
    write_manifest(
        staging,
        {
            "kind": "split",
            "dataset": spec.name,
            "digest": result.digest,
            "train_digest": result.train_digest,
            "val_digest": result.val_digest,
            "quality_digest": assessment["digest"],
            "raw_digest": assessment["raw_digest"],
            "spec": as_json(spec),
            "num_raw": result.num_raw,
            "num_train": result.num_train,
            "num_val": result.num_val,
            "num_unused": result.num_unused,
            "num_rejected": result.num_rejected,
            "num_augmented": result.num_augmented,
            "augmentations": result.augmentations,
            "unused_reasons": result.unused_reasons,
            "reject_reasons": result.reject_reasons,
        },
    )
    publish(staging, result.directory)
    point_symlink(layout.data / spec.name, result.directory)
