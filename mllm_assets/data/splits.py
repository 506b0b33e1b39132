"""Write the training and validation splits: ShareGPT rows, content-addressed images, a manifest, a swapped link."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mllm_assets.artifacts import digest_json, point_symlink, publish, read_manifest, staging_directory, write_manifest
from mllm_assets.data.assign import REJECTED, TRAIN, UNUSED, VAL, Assignment, Candidate, assign
from mllm_assets.data.augment import Copy, Forbidden, augmented_rows
from mllm_assets.data.fixed_splits import assign_as_given
from mllm_assets.data.images import sha256
from mllm_assets.data.publish import ImageWriter, build_row, image_number
from mllm_assets.data.row_files import rows_as_bytes
from mllm_assets.data.sources import read_raw
from mllm_assets.data.spec import DatasetSpec, as_json
from mllm_assets.layout import Layout
from mllm_assets.quality.duplicates import Pair, pairs_of_looks
from mllm_assets.quality.files import IMAGES_FILE, QUALITY_FILE
from mllm_assets.quality.store import QualityStore, table_for, utc_now

SIDES = (TRAIN, VAL)
AUGMENTED = "augmented"


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
        IntegrityError: `raw` or `quality` was never finished.
        DataError: Fewer than two samples are usable.
    """
    num_source_rows = read_manifest(raw)["num_source_rows"]
    read_manifest(quality)
    store = QualityStore(layout.quality_db)
    verdicts = pq.read_table(quality / QUALITY_FILE).to_pylist()
    if spec.split_is_given:
        assignments = assign_as_given(spec, verdicts, num_source_rows)
    else:
        assignments = _assignments(spec, store, quality, verdicts)
    by_id = {assignment.sample_id: assignment for assignment in assignments}
    images = ImageWriter(spec, layout)
    rows = _write_images_and_rows(spec, images, raw, by_id)
    copies = _augment(spec, images, raw, quality, by_id) if spec.augment else []
    copied = [copy.row for copy in copies if copy.row is not None]
    contents = {
        TRAIN: rows_as_bytes([*rows[TRAIN], *copied], spec.output.format),
        VAL: rows_as_bytes(rows[VAL], spec.output.format),
    }
    digests = {side: sha256(content)[:16] for side, content in contents.items()}
    digest = digest_json([digests[TRAIN], digests[VAL]])[:16]
    unused = Counter(a.reason or "" for a in assignments if a.split == UNUSED)
    rejected = Counter(v["reject_reason"] for v in verdicts if v["reject_reason"] is not None)
    result = SplitResult(
        directory=layout.version(spec.name, digest),
        digest=digest,
        train_digest=digests[TRAIN],
        val_digest=digests[VAL],
        num_raw=len(verdicts),
        num_train=len(rows[TRAIN]),
        num_val=len(rows[VAL]),
        num_unused=unused.total(),
        num_rejected=rejected.total(),
        num_augmented=len(copied),
        unused_reasons=dict(sorted(unused.items())),
        reject_reasons=dict(sorted(rejected.items())),
        augmentations=dict(sorted(Counter(_fate(copy) for copy in copies).items())),
    )
    _publish(spec, layout, result, contents, images.digests, quality)
    store.write({"split_membership": _membership(spec, result, assignments, verdicts, copies, run_id)})
    return result


def split_key(spec: DatasetSpec) -> str:
    """What `history` hangs on: another seed or other sizes are another split, with a history of its own."""
    key = f"seed={spec.split.seed} train={spec.split.num_train} val={spec.split.num_val}"
    if spec.split_is_given:
        key += " source" if spec.source.val_split is not None else " guide"
    return key


def split_file(side: str, format: str) -> str:
    """The name of a side's file in a version: `train.json`."""
    return f"{side}.{format}"


def _assignments(
    spec: DatasetSpec, store: QualityStore, quality: Path, verdicts: list[dict[str, Any]]
) -> list[Assignment]:
    images = pq.read_table(quality / IMAGES_FILE, columns=["image_sha256", "look", "phash_64", "color_48"]).to_pylist()
    looks = {image["image_sha256"]: image["look"] for image in images}
    seen = {image["look"]: image for image in images if image["look"] is not None}
    candidates = [
        Candidate(
            sample_id=verdict["sample_id"],
            image_ids=tuple(verdict["image_ids"]),
            looks=tuple(looks[image_id] for image_id in verdict["image_ids"]),
        )
        for verdict in verdicts
        if verdict["reject_reason"] is None
    ]

    def near(some: Collection[str]) -> list[Pair]:
        return pairs_of_looks(
            {look: (seen[look]["phash_64"], seen[look]["color_48"]) for look in some},
            distance_bits=spec.quality.duplicate_distance_bits,
            color_distance=spec.quality.duplicate_color_distance,
        )

    history = store.query(
        "SELECT sample_id, split FROM split_membership "
        "WHERE dataset = ? AND split_key = ? AND split IN ('train', 'val') "
        "QUALIFY row_number() OVER (PARTITION BY sample_id ORDER BY written_at DESC) = 1",
        [spec.name, split_key(spec)],
    )
    return assign(candidates, near, spec.split, {row["sample_id"]: row["split"] for row in history})


def _write_images_and_rows(
    spec: DatasetSpec, images: ImageWriter, raw: Path, by_id: Mapping[str, Assignment]
) -> dict[str, list[dict[str, Any]]]:
    """Publish the images of used samples and build their rows, by side."""
    placed: dict[str, dict[int, dict[str, Any]]] = {side: {} for side in SIDES}
    for sample in read_raw(raw):
        assignment = by_id.get(sample["sample_id"])
        if assignment is None or assignment.position is None:
            continue
        side, position = assignment.split, assignment.position
        paths = [
            images.write(data, source_id, image_number(side, position, index))
            for index, (source_id, data) in enumerate(zip(sample["image_ids"], sample["images"], strict=True))
        ]
        placed[side][position] = build_row(spec, sample, position, paths)
    return {side: [rows[position] for position in sorted(rows)] for side, rows in placed.items()}


def _augment(
    spec: DatasetSpec, images: ImageWriter, raw: Path, quality: Path, by_id: Mapping[str, Assignment]
) -> list[Copy]:
    sides: dict[str, dict[str, int]] = {side: {} for side in SIDES}
    for sample_id, assignment in by_id.items():
        if assignment.position is not None:
            sides[assignment.split][sample_id] = assignment.position
    validating = {
        image_id
        for row in pq.read_table(quality / QUALITY_FILE, columns=["sample_id", "image_ids"]).to_pylist()
        if row["sample_id"] in sides[VAL]
        for image_id in row["image_ids"]
    }
    measured = pq.read_table(quality / IMAGES_FILE, columns=["image_sha256", "phash_64", "color_48"]).to_pylist()
    forbidden = Forbidden((row for row in measured if row["image_sha256"] in validating), spec.quality)
    return augmented_rows(spec, images, raw, sides[TRAIN], forbidden)


def _fate(copy: Copy) -> str:
    return copy.operation if copy.row is not None else "augmentation_matches_val"


def _publish(
    spec: DatasetSpec,
    layout: Layout,
    result: SplitResult,
    contents: Mapping[str, bytes],
    images: Mapping[str, str],
    quality: Path,
) -> None:
    with staging_directory(result.directory.parent) as staging:
        for side, content in contents.items():
            (staging / split_file(side, spec.output.format)).write_bytes(content)
        write_manifest(
            staging,
            {
                "kind": "split",
                "dataset": spec.name,
                "digest": result.digest,
                "train_digest": result.train_digest,
                "val_digest": result.val_digest,
                "quality_digest": read_manifest(quality)["digest"],
                "raw_digest": read_manifest(quality)["raw_digest"],
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
                "images": dict(sorted(images.items())),
            },
        )
        publish(staging, result.directory)
    point_symlink(layout.data / spec.name, result.directory)


def _membership(
    spec: DatasetSpec,
    result: SplitResult,
    assignments: list[Assignment],
    verdicts: list[dict[str, Any]],
    copies: list[Copy],
    run_id: str,
) -> Any:
    common = {
        "dataset": spec.name,
        "split_digest": result.digest,
        "split_key": split_key(spec),
        "run_id": run_id,
        "written_at": utc_now(),
    }
    rows = [
        {
            **common,
            "sample_id": a.sample_id,
            "duplicate_group": a.group,
            "split": a.split,
            "reason": a.reason,
            "position": a.position,
        }
        for a in assignments
    ]
    rows += [
        {**common, "sample_id": v["sample_id"], "split": REJECTED, "reason": v["reject_reason"]}
        for v in verdicts
        if v["reject_reason"] is not None
    ]
    rows += [{**common, "sample_id": c.sample_id, "split": AUGMENTED, "reason": _fate(c)} for c in copies]
    return table_for("split_membership", rows)
