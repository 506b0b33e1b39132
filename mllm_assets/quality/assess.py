"""Assess an ingested dataset: measure, judge, find duplicates, and keep a row that says why for every sample."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.artifacts import digest_json, publish, read_manifest, staging_directory, write_manifest
from mllm_assets.data.images import sha256
from mllm_assets.data.sources import read_image_ids, read_raw
from mllm_assets.data.spec import DatasetSpec, as_json
from mllm_assets.layout import Layout
from mllm_assets.quality.decoding import measure_images
from mllm_assets.quality.duplicates import Pair, find_pairs, group_keys, group_samples, look_of
from mllm_assets.quality.probes import PROBE_VERSION, DecodeLimits, ImageMeasurement, measure_caption
from mllm_assets.quality.store import QualityStore, table_for, utc_now
from mllm_assets.quality.verdicts import image_flags, sample_reject_reason

QUALITY_FILE = "quality.parquet"
IMAGES_FILE = "images.parquet"
PAIRS_FILE = "pairs.parquet"
MEASURED = ("width_px", "height_px", "num_bytes", "brightness_p5", "brightness_p99", "blur_edge_std", "entropy_bits")
# measurements that end at a limit of the spec are not complete, so they are not used again under other limits
_CUT_SHORT = (
    "image_too_many_bytes",
    "image_too_many_pixels",
    "image_too_many_frames",
    "image_decode_too_slow",
    "image_decoder_crashed",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityResult:
    """What was found; `summary` has a row per measured number: minimum, median and maximum over the images."""

    directory: Path
    digest: str
    num_samples: int
    num_rejected: int
    num_duplicates: int
    reject_reasons: dict[str, int]
    flags: dict[str, int]
    num_decoded: int
    summary: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Assessment:
    samples: list[dict[str, Any]]
    images: list[dict[str, Any]]
    pairs: list[Pair]


def assess(spec: DatasetSpec, layout: Layout, raw: Path, run_id: str) -> QualityResult:
    """Measure every sample of `raw` once, reject what cannot be used, and group what looks the same.

    Writes `data/.quality/<dataset>/<digest>/` (a row per sample, per image and per pair of near-duplicates) and the
    DuckDB tables. The digest covers measurements and verdicts, not the run. An image that DuckDB already has
    measurements for is not decoded again, so another threshold costs no decoding.

    Raises:
        IntegrityError: `raw` was never finished.
    """
    raw_manifest = read_manifest(raw)
    store = QualityStore(layout.quality_db)
    known = _known_measurements(store, read_image_ids(raw))
    num_known = len(known)
    samples = _measure(spec, raw, known)
    num_decoded = len(known) - num_known
    assessment = _judge(spec, samples, known)
    digest = digest_json([assessment.samples, assessment.images, [(p.a, p.b) for p in assessment.pairs]])[:16]
    result = _result(layout.quality(spec.name, digest), digest, assessment, num_decoded)
    with staging_directory(result.directory.parent) as staging:
        _write_files(staging, assessment)
        write_manifest(
            staging,
            {
                "kind": "quality",
                "dataset": spec.name,
                "digest": digest,
                "raw_digest": raw_manifest["digest"],
                "probe_version": PROBE_VERSION,
                "spec": as_json(spec.quality),
                "num_samples": result.num_samples,
                "num_rejected": result.num_rejected,
                "reject_reasons": result.reject_reasons,
            },
        )
        publish(staging, result.directory)
    store.write(_tables(spec, raw_manifest["digest"], result, samples, assessment, run_id))
    return result


def _known_measurements(store: QualityStore, image_ids: set[str]) -> dict[str, ImageMeasurement]:
    columns = ", ".join(ImageMeasurement.__dataclass_fields__)
    rows = store.query(
        f"SELECT {columns} FROM image_quality WHERE probe_version = ? "
        "AND image_sha256 IN (SELECT unnest(?::VARCHAR[]))",
        [PROBE_VERSION, sorted(image_ids)],
    )
    return {row["image_sha256"]: ImageMeasurement(**row) for row in rows if row["defect"] not in _CUT_SHORT}


def _measure(spec: DatasetSpec, raw: Path, known: dict[str, ImageMeasurement]) -> list[dict[str, Any]]:
    limits = DecodeLimits(
        max_pixels=spec.quality.max_pixels,
        max_bytes=spec.quality.max_image_bytes,
        max_frames=spec.quality.max_frames,
        max_decode_s=spec.quality.max_decode_s,
    )
    samples: list[dict[str, Any]] = []
    for image in measure_images(_unmeasured(raw, set(known), samples), limits):
        known[image.image_sha256] = image
    return samples


def _unmeasured(raw: Path, known: set[str], samples: list[dict[str, Any]]) -> Iterator[bytes]:
    """Each image that is not known yet, once; notes what each sample holds on the way."""
    for row in read_raw(raw):
        for image_id, data in zip(row["image_ids"], row["images"], strict=True):
            if image_id not in known:
                known.add(image_id)
                yield data
        kept = {key: row[key] for key in ("sample_id", "row_index", "caption", "label", "image_ids")}
        digest = None if row["caption"] is None else sha256(row["caption"].encode())
        samples.append({**kept, "caption_sha256": digest, **measure_caption(row["caption"])})


def _judge(spec: DatasetSpec, samples: list[dict[str, Any]], known: dict[str, ImageMeasurement]) -> _Assessment:
    limits = spec.quality
    used = {image_id: known[image_id] for sample in samples for image_id in sample["image_ids"]}
    reasons = {
        sample["sample_id"]: sample_reject_reason(
            [used[image_id] for image_id in sample["image_ids"]], sample["caption"], sample["label"], spec
        )
        for sample in samples
    }
    accepted = {s["sample_id"]: s["image_ids"] for s in samples if reasons[s["sample_id"]] is None}
    usable = {image_id: used[image_id] for image_ids in accepted.values() for image_id in image_ids}
    looks = {image_id: look_of(image) for image_id, image in usable.items()}
    pairs = find_pairs(
        usable.values(),
        distance_bits=limits.duplicate_distance_bits,
        color_distance=limits.duplicate_color_distance,
    )
    groups = group_samples({key: [looks[i] for i in image_ids] for key, image_ids in accepted.items()}, pairs)
    keys = group_keys(groups, accepted)
    sizes = Counter(keys.values())
    caption_columns = tuple(measure_caption(None))
    rows = []
    for sample in samples:
        sample_id = sample["sample_id"]
        group = keys.get(sample_id)
        rows.append(
            {
                "sample_id": sample_id,
                "row_index": sample["row_index"],
                "image_ids": sample["image_ids"],
                **{column: sample[column] for column in caption_columns},
                "flags": sorted({flag for i in sample["image_ids"] for flag in image_flags(used[i], limits)}),
                "reject_reason": reasons[sample_id],
                "duplicate_group": group,
                "group_size": 0 if group is None else sizes[group],
            }
        )
    images = [{**used[image_id].as_row(), "look": looks.get(image_id)} for image_id in sorted(used)]
    return _Assessment(rows, images, pairs)


def _result(directory: Path, digest: str, assessment: _Assessment, num_decoded: int) -> QualityResult:
    reasons = Counter(row["reject_reason"] for row in assessment.samples if row["reject_reason"] is not None)
    groups = [row["duplicate_group"] for row in assessment.samples if row["duplicate_group"] is not None]
    return QualityResult(
        directory=directory,
        digest=digest,
        num_samples=len(assessment.samples),
        num_rejected=reasons.total(),
        num_duplicates=len(groups) - len(set(groups)),
        reject_reasons=dict(sorted(reasons.items())),
        flags=dict(sorted(Counter(flag for row in assessment.samples for flag in row["flags"]).items())),
        num_decoded=num_decoded,
        summary=[_summary_row(name, assessment.images) for name in MEASURED],
    )


def _summary_row(name: str, images: list[dict[str, Any]]) -> dict[str, Any]:
    values = sorted(image[name] for image in images if image[name] is not None)
    if not values:
        return {"measure": name, "num_images": 0, "minimum": None, "median": None, "maximum": None}
    return {
        "measure": name,
        "num_images": len(values),
        "minimum": values[0],
        "median": values[len(values) // 2],
        "maximum": values[-1],
    }


def _write_files(staging: Path, assessment: _Assessment) -> None:
    strings = pa.list_(pa.string())
    sample_schema = pa.schema(
        [("sample_id", pa.string()), ("row_index", pa.int64()), ("image_ids", strings)]
        + [(column, pa.float64() if column.endswith("_share") else pa.int64()) for column in measure_caption(None)]
        + [("flags", strings), ("reject_reason", pa.string()), ("duplicate_group", pa.string())]
        + [("group_size", pa.int64())]
    )
    image_schema = table_for("image_quality", []).schema
    image_schema = image_schema.remove(image_schema.get_field_index("probe_version"))
    image_schema = image_schema.remove(image_schema.get_field_index("run_id")).append(pa.field("look", pa.string()))
    pair_schema = pa.schema(
        [("a", pa.string()), ("b", pa.string()), ("distance_bits", pa.int64()), ("color_distance", pa.float64())]
    )
    pairs = [
        {"a": p.a, "b": p.b, "distance_bits": p.distance_bits, "color_distance": p.color_distance}
        for p in assessment.pairs
    ]
    pq.write_table(pa.Table.from_pylist(assessment.samples, schema=sample_schema), staging / QUALITY_FILE)
    pq.write_table(pa.Table.from_pylist(assessment.images, schema=image_schema), staging / IMAGES_FILE)
    pq.write_table(pa.Table.from_pylist(pairs, schema=pair_schema), staging / PAIRS_FILE)


def _tables(
    spec: DatasetSpec,
    raw_digest: str,
    result: QualityResult,
    samples: list[dict[str, Any]],
    assessment: _Assessment,
    run_id: str,
) -> dict[str, pa.Table]:
    common = {"dataset": spec.name, "run_id": run_id, "raw_digest": raw_digest, "quality_digest": result.digest}
    judged = {
        **common,
        "probe_version": PROBE_VERSION,
        "thresholds": json.dumps(as_json(spec.quality)),
        "num_samples": result.num_samples,
        "num_rejected": result.num_rejected,
        "num_duplicates": result.num_duplicates,
        "written_at": utc_now(),
    }
    images = [
        {**common, "sample_id": s["sample_id"], "image_index": index, "image_sha256": image_id}
        for s in samples
        for index, image_id in enumerate(s["image_ids"])
    ]
    qualities = [{**common, **image, "probe_version": PROBE_VERSION} for image in assessment.images]
    return {
        "samples": table_for("samples", [{**common, **s, "num_images": len(s["image_ids"])} for s in samples]),
        "sample_versions": table_for("sample_versions", [{**common, **s} for s in samples]),
        "images": table_for("images", images),
        "image_quality": table_for("image_quality", qualities),
        "caption_quality": table_for(
            "caption_quality",
            [{**common, **s, "probe_version": PROBE_VERSION} for s in samples if s["caption"] is not None],
        ),
        "assessments": table_for("assessments", [judged]),
        "verdicts": table_for("verdicts", [{**common, **row} for row in assessment.samples]),
        "duplicate_pairs": table_for("duplicate_pairs", [{**common, **row} for row in _sample_pairs(assessment)]),
    }


def _sample_pairs(assessment: _Assessment) -> list[dict[str, Any]]:
    """Pairs of samples for people: each look's first sample with its others, and with those of near looks."""
    image_of: dict[str, dict[str, Any]] = {image["image_sha256"]: image for image in assessment.images}
    holders: dict[str, list[tuple[str, str]]] = {}
    for row in assessment.samples:
        if row["reject_reason"] is None:
            for image_id in row["image_ids"]:
                holders.setdefault(image_of[image_id]["look"], []).append((row["sample_id"], image_id))
    pairs = []
    for (first, first_image), *others in holders.values():
        for other, other_image in others:
            kind = "exact" if other_image == first_image else "near"
            pairs.append(_sample_pair(first, other, kind, 0, 0.0))
    for pair in assessment.pairs:
        first, other = holders[pair.a][0][0], holders[pair.b][0][0]
        pairs.append(_sample_pair(first, other, "near", pair.distance_bits, pair.color_distance))
    return [pair for pair in pairs if pair["sample_a"] != pair["sample_b"]]


def _sample_pair(first: str, other: str, kind: str, distance_bits: int, color_distance: float) -> dict[str, Any]:
    sample_a, sample_b = sorted((first, other))
    return {
        "sample_a": sample_a,
        "sample_b": sample_b,
        "kind": kind,
        "distance_bits": distance_bits,
        "color_distance": color_distance,
    }
