"""Write the training and validation splits: ShareGPT JSON, content-addressed images, a manifest, a swapped link."""

import json
import uuid
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mllm_assets.artifacts import digest_json, point_symlink, publish, read_manifest, staging_directory, write_manifest
from mllm_assets.data.assign import REJECTED, TRAIN, UNUSED, VAL, Assignment, Candidate, assign
from mllm_assets.data.images import published_bytes, sha256
from mllm_assets.data.sources import read_raw
from mllm_assets.data.spec import DatasetSpec, as_json
from mllm_assets.data.tokens import IMAGE_PLACEHOLDER
from mllm_assets.layout import Layout
from mllm_assets.quality.duplicates import Pair, pairs_of_looks
from mllm_assets.quality.files import IMAGES_FILE, QUALITY_FILE
from mllm_assets.quality.store import QualityStore, table_for, utc_now
from mllm_assets.quality.verdicts import render_answer

SPLIT_FILES = {TRAIN: "train.json", VAL: "val.json"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitResult:
    """A version of a dataset: num_raw = num_train + num_val + num_unused + num_rejected."""

    directory: Path
    digest: str
    train_digest: str
    val_digest: str
    num_raw: int
    num_train: int
    num_val: int
    num_unused: int
    num_rejected: int
    unused_reasons: dict[str, int]
    reject_reasons: dict[str, int]


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
    read_manifest(raw)
    read_manifest(quality)
    store = QualityStore(layout.quality_db)
    verdicts = pq.read_table(quality / QUALITY_FILE).to_pylist()
    assignments = _assignments(spec, store, quality, verdicts)
    by_id = {assignment.sample_id: assignment for assignment in assignments}
    rows, images = _write_images_and_rows(spec, layout, raw, by_id)
    texts = {side: json.dumps(rows[side], indent=2, ensure_ascii=False) + "\n" for side in SPLIT_FILES}
    digests = {side: sha256(text.encode())[:16] for side, text in texts.items()}
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
        unused_reasons=dict(sorted(unused.items())),
        reject_reasons=dict(sorted(rejected.items())),
    )
    _publish(spec, layout, result, texts, images, quality)
    store.write({"split_membership": _membership(spec, result, assignments, verdicts, run_id)})
    return result


def split_key(spec: DatasetSpec) -> str:
    """What `history` hangs on: another seed or other sizes are another split, with a history of its own."""
    return f"seed={spec.split.seed} train={spec.split.num_train} val={spec.split.num_val}"


def build_row(spec: DatasetSpec, sample: Mapping[str, Any], position: int, image_paths: list[str]) -> dict[str, Any]:
    """One ShareGPT row; prompts are used in turn by position. LLaMA-Factory ignores `id` and `label`."""
    prompt = spec.prompts[position % len(spec.prompts)]
    messages = [] if spec.system is None else [{"role": "system", "content": spec.system}]
    messages += [
        {"role": "user", "content": IMAGE_PLACEHOLDER * len(image_paths) + prompt},
        {"role": "assistant", "content": render_answer(sample["caption"], sample["label"], spec)},
    ]
    row = {"messages": messages, "images": image_paths, "id": sample["sample_id"]}
    if spec.source.label_column is not None:
        # as the answer shows it, so that the two can be compared
        row["label"] = (sample["label"] or "").replace("_", " ")
    return row


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
    spec: DatasetSpec, layout: Layout, raw: Path, by_id: Mapping[str, Assignment]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Publish the images of used samples and build their rows; returns rows by split and image path -> sha256."""
    placed: dict[str, dict[int, dict[str, Any]]] = {side: {} for side in SPLIT_FILES}
    digests: dict[str, str] = {}
    names: dict[str, str] = {}
    for sample in read_raw(raw):
        assignment = by_id.get(sample["sample_id"])
        if assignment is None or assignment.position is None:
            continue
        for source_id, data in zip(sample["image_ids"], sample["images"], strict=True):
            if source_id not in names:
                content, extension = published_bytes(data)
                image_id = source_id if content is data else sha256(content)
                names[source_id] = f"images/{image_id[:16]}.{extension}"
                digests[names[source_id]] = image_id
                _write_image(layout.data / names[source_id], content, image_id)
        paths = [names[source_id] for source_id in sample["image_ids"]]
        placed[assignment.split][assignment.position] = build_row(spec, sample, assignment.position, paths)
    return {side: [rows[position] for position in sorted(rows)] for side, rows in placed.items()}, digests


def _write_image(path: Path, content: bytes, image_id: str) -> None:
    """Write a content-addressed file unless it is there and whole."""
    if path.is_file() and path.stat().st_size == len(content) and sha256(path.read_bytes()) == image_id:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _publish(
    spec: DatasetSpec,
    layout: Layout,
    result: SplitResult,
    texts: Mapping[str, str],
    images: Mapping[str, str],
    quality: Path,
) -> None:
    with staging_directory(result.directory.parent) as staging:
        for side, name in SPLIT_FILES.items():
            (staging / name).write_text(texts[side], encoding="utf-8")
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
    return table_for("split_membership", rows)
