"""Assess an ingested dataset: measure, judge, find duplicates, and keep a row that says why for every sample.

What is held in memory for a sample are a few dozen bytes: the images' digests, hashes and colours as arrays. Images
and texts pass by, a row group or a batch at a time.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mllm_assets.artifacts import publish, read_manifest, staging_directory, write_manifest
from mllm_assets.data.images import sha256
from mllm_assets.data.raw_files import ImageIndex, index_images, read_text_batches, read_texts
from mllm_assets.data.spec import DatasetSpec, as_json
from mllm_assets.layout import Layout
from mllm_assets.quality.files import DUPLICATES_FILE, IMAGES_FILE, PAIRS_FILE, QUALITY_FILE
from mllm_assets.quality.groups import SampleGroups, SamplePair, find_duplicates
from mllm_assets.quality.measure import Images, flag_names, measure_images
from mllm_assets.quality.probes import PROBE_VERSION, measure_caption
from mllm_assets.quality.record import record
from mllm_assets.quality.store import QualityStore
from mllm_assets.quality.verdicts import sample_reject_reason

TEXT_COLUMNS = ("sample_id", "row_index", "caption", "label", "messages", "source_split", "source_defect")
BATCH_ROWS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityResult:
    """What was found. `num_decoded` images were measured now; the others were known."""

    directory: Path
    digest: str
    num_samples: int
    num_rejected: int
    num_duplicates: int
    reject_reasons: dict[str, int]
    flags: dict[str, int]
    num_decoded: int


def assess(spec: DatasetSpec, layout: Layout, raw: Path, run_id: str) -> QualityResult:
    """Measure every sample of `raw` once, reject what cannot be used, and group what looks the same.

    Writes `data/.quality/<dataset>/<digest>/` (a row per sample, per image and per pair of near-duplicates) and the
    DuckDB tables. The digest covers the source, measurements and verdicts, not the run. An image that DuckDB already
    has measurements for is not decoded again, so neither another threshold nor a known image costs any decoding.

    Raises:
        IntegrityError: `raw` was never finished, or is damaged.
    """
    raw_digest = read_manifest(raw)["digest"]
    store = QualityStore(layout.quality_db)
    index = index_images(raw)
    with staging_directory(layout.quality(spec.name, "new").parent) as staging:
        images = measure_images(spec.quality, raw, index, store, staging / IMAGES_FILE)
        reasons = _reject_reasons(spec, raw, index, images)
        accepted = np.array([reason is None for reason in reasons], bool)
        duplicates = find_duplicates(index, images, accepted, spec.quality)
        counts = _write_samples(raw, index, images, reasons, duplicates.groups, staging / QUALITY_FILE)
        pq.write_table(duplicates.look_pairs, staging / PAIRS_FILE)
        _write_pairs(raw, index, duplicates.sample_pairs, staging / DUPLICATES_FILE)
        digest = _digest(staging, raw_digest)
        result = QualityResult(
            directory=layout.quality(spec.name, digest),
            digest=digest,
            num_samples=index.num_samples,
            num_rejected=counts.reasons.total(),
            num_duplicates=duplicates.groups.num_duplicates,
            reject_reasons=dict(sorted(counts.reasons.items())),
            flags=dict(sorted(counts.flags.items())),
            num_decoded=images.num_decoded,
        )
        write_manifest(
            staging,
            {
                "kind": "quality",
                "dataset": spec.name,
                "digest": digest,
                "raw_digest": raw_digest,
                "probe_version": PROBE_VERSION,
                "spec": as_json(spec.quality),
                "num_samples": result.num_samples,
                "num_rejected": result.num_rejected,
                "num_duplicates": result.num_duplicates,
                "reject_reasons": result.reject_reasons,
            },
        )
        publish(staging, result.directory)
    record(store, raw, result.directory, run_id)
    return result


def _reject_reasons(spec: DatasetSpec, raw: Path, index: ImageIndex, images: Images) -> list[str | None]:
    """Why each sample is rejected; equal reasons are one object."""
    reasons = []
    for number, row in enumerate(read_texts(raw, TEXT_COLUMNS)):
        uses = index.uses_T[index.offsets_S1[number] : index.offsets_S1[number + 1]]
        of_images = [images.reasons[images.reasons_U[use]] for use in uses.tolist()]
        reasons.append(sample_reject_reason(of_images, row, spec))
    return reasons


@dataclass(frozen=True, slots=True)
class _Counts:
    reasons: Counter[str]
    flags: Counter[str]


def _write_samples(
    raw: Path,
    index: ImageIndex,
    images: Images,
    reasons: list[str | None],
    groups: SampleGroups,
    path: Path,
) -> _Counts:
    """Write a row a sample, column by column: as dictionaries they take three times as long."""
    counts = _Counts(Counter(reason for reason in reasons if reason is not None), Counter())
    schema = _sample_schema()
    named: dict[int, list[str]] = {}  # the flags of each bit field
    first = 0
    with pq.ParquetWriter(path, schema) as writer:
        for texts in read_text_batches(raw, ("sample_id", "row_index", "source_split", "caption"), BATCH_ROWS):
            last = first + len(texts)
            offsets = index.offsets_S1[first : last + 1]
            uses = index.uses_T[offsets[0] : offsets[-1]]
            captions = texts["caption"].to_pylist()
            measured = [measure_caption(caption) for caption in captions]
            flags = [named.setdefault(bits, flag_names(bits)) for bits in _flag_bits(images, uses, offsets)]
            counts.flags.update(chain.from_iterable(flags))
            columns = {
                "sample_id": texts["sample_id"],
                "row_index": texts["row_index"],
                "image_ids": pa.ListArray.from_arrays((offsets - offsets[0]).astype(np.int32), index.ids.take(uses)),
                "source_split": texts["source_split"],
                "caption_sha256": [None if caption is None else sha256(caption.encode()) for caption in captions],
                **{name: [values[name] for values in measured] for name in measured[0]},
                "flags": flags,
                "reject_reason": reasons[first:last],
                "duplicate_group": [groups.key(sample) for sample in range(first, last)],
                "group_size": [groups.size(sample) for sample in range(first, last)],
            }
            writer.write_table(pa.table(columns, schema=schema))
            first = last
    return counts


def _flag_bits(images: Images, uses: NDArray[np.int32], offsets: NDArray[np.int64]) -> list[int]:
    """All flags of each sample's images; `offsets` as in `ImageIndex`, of some samples."""
    bits = np.zeros(len(offsets) - 1, np.uint32)
    some = np.flatnonzero(np.diff(offsets))
    if len(some):
        bits[some] = np.bitwise_or.reduceat(images.flags_U[uses], (offsets - offsets[0])[some])
    return bits.tolist()


def _sample_schema() -> pa.Schema:
    strings = pa.list_(pa.string())
    captions = [(name, pa.float64() if name.endswith("_share") else pa.int64()) for name in measure_caption(None)]
    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("row_index", pa.int64()),
            ("image_ids", strings),
            ("source_split", pa.string()),
            ("caption_sha256", pa.string()),
            *captions,
            ("flags", strings),
            ("reject_reason", pa.string()),
            ("duplicate_group", pa.string()),
            ("group_size", pa.int64()),
        ]
    )


PAIR_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("sample_a", "sample_b", "image_a", "image_b", "kind")]
    + [("distance_bits", pa.int64()), ("color_distance", pa.float64())]
)


def _write_pairs(raw: Path, index: ImageIndex, pairs: list[SamplePair], path: Path) -> None:
    """Pairs of samples for people, the smaller id first."""
    numbers: NDArray[np.int64] = np.unique([pair.samples for pair in pairs])
    wanted = set(numbers.tolist())
    names = {number: row["sample_id"] for number, row in enumerate(read_texts(raw, ["sample_id"])) if number in wanted}

    def rows() -> Iterator[dict[str, Any]]:
        for pair in pairs:
            ends = sorted(
                (names[sample], index.ids[image].as_py())
                for sample, image in zip(pair.samples, pair.images, strict=True)
            )
            (sample_a, image_a), (sample_b, image_b) = ends
            yield {
                "sample_a": sample_a,
                "sample_b": sample_b,
                "image_a": image_a,
                "image_b": image_b,
                "kind": "exact" if image_a == image_b else "near",
                "distance_bits": pair.distance_bits,
                "color_distance": pair.color_distance,
            }

    _write_parquet(path, PAIR_SCHEMA, rows())


def _write_parquet(path: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        pending: list[dict[str, Any]] = []
        for row in rows:
            pending.append(row)
            if len(pending) == BATCH_ROWS:
                writer.write_table(pa.Table.from_pylist(pending, schema=schema))
                pending = []
        if pending:
            writer.write_table(pa.Table.from_pylist(pending, schema=schema))


def _digest(directory: Path, raw_digest: str) -> str:
    """16 hex digits of the source and the rows, whatever version of Parquet holds them in whatever batches."""
    digest = hashlib.sha256(f"{raw_digest}\n".encode())
    for name in (QUALITY_FILE, IMAGES_FILE, PAIRS_FILE):
        with pq.ParquetFile(directory / name, pre_buffer=False) as file:
            columns = {column: hashlib.sha256() for column in file.schema_arrow.names}
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for column, values in zip(columns, batch.columns, strict=True):
                    columns[column].update(json.dumps(values.to_pylist())[1:-1].encode() + b", ")
        for column, values in columns.items():
            digest.update(f"{name} {column} {values.hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
