"""Assess an ingested dataset: measure, judge, find duplicates, and record the verdict on every sample.

A sample takes a few dozen bytes of memory: the images' digests, hashes and colours as arrays. Images and texts are
read a row group or a batch at a time.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mllm_assets.artifacts import publish, read_manifest, staging_directory, write_manifest
from mllm_assets.data.ingest.images import sha256
from mllm_assets.data.ingest.raw_files import ImageIndex, index_images, read_text_batches, read_texts
from mllm_assets.data.ingest.spec import DatasetSpec, as_json
from mllm_assets.data.quality.groups import (
    DUPLICATES_FILE,
    IMAGES_FILE,
    PAIRS_FILE,
    QUALITY_FILE,
    SampleGroups,
    SamplePair,
    find_duplicates,
)
from mllm_assets.data.quality.measure import Images, flag_names, measure_images
from mllm_assets.data.quality.probes import PROBE_VERSION, measure_caption
from mllm_assets.data.quality.record import record
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.quality.verdicts import sample_reject_reason
from mllm_assets.layout import Layout
from mllm_assets.progress import doing

TEXT_COLUMNS = ("sample_id", "row_index", "caption", "label", "messages", "source_split", "source_defect", "fields")
BATCH_ROWS = 4096
SAMPLE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("row_index", pa.int64()),
        ("image_ids", pa.list_(pa.string())),
        ("source_split", pa.string()),
        ("caption_sha256", pa.string()),
        *((name, pa.float64() if name.endswith("_share") else pa.int64()) for name in measure_caption(None)),
        ("flags", pa.list_(pa.string())),
        ("reject_reason", pa.string()),
        ("duplicate_group", pa.string()),
        ("group_size", pa.int64()),
    ]
)
PAIR_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("sample_a", "sample_b", "image_a", "image_b", "kind")]
    + [("distance_bits", pa.int64()), ("color_distance", pa.float64())]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityResult:
    """What an assessment found. `num_decoded` images were measured now; the others were known."""

    directory: Path
    digest: str
    num_samples: int
    num_rejected: int
    num_duplicates: int
    reject_reasons: dict[str, int]
    flags: dict[str, int]
    num_decoded: int


@doing("assess samples")
def assess(spec: DatasetSpec, layout: Layout, raw: Path, run_id: str) -> QualityResult:
    """Measure every sample of `raw` once, reject what cannot be used, and group duplicates.

    Writes `data/.quality/<dataset>/<digest>/` (a row per sample, per image and per pair of near-duplicates) and the
    DuckDB tables. The digest covers the source, measurements and verdicts, not the run. An image whose
    measurements are in DuckDB already is not decoded again, so another threshold costs no decoding.

    Raises:
        IntegrityError: `raw` was never finished, or is damaged.
    """
    raw_digest = read_manifest(raw)["digest"]
    store = QualityStore(layout.quality_db)
    index = index_images(raw)
    with staging_directory(layout.quality(spec.name, "new").parent) as staging:
        images = measure_images(spec.quality, raw, index, store, staging / IMAGES_FILE)
        reasons = reject_reasons(spec, read_texts(raw, TEXT_COLUMNS), index, images)
        accepted = np.array([reason is None for reason in reasons], bool)
        duplicates = find_duplicates(index, images, accepted, spec.quality)
        flags = _write_samples(raw, index, images, reasons, duplicates.groups, staging / QUALITY_FILE)
        pq.write_table(duplicates.look_pairs, staging / PAIRS_FILE)
        _write_pairs(raw, index, duplicates.sample_pairs, staging / DUPLICATES_FILE)
        digest = _digest(staging, raw_digest)
        counts: dict[str, Any] = {
            "digest": digest,
            "num_samples": index.num_samples,
            "num_rejected": int((~accepted).sum()),
            "num_duplicates": duplicates.groups.num_duplicates,
            "reject_reasons": dict(sorted(Counter(filter(None, reasons)).items())),
        }
        manifest = {
            "kind": "quality",
            "dataset": spec.name,
            "raw_digest": raw_digest,
            "probe_version": PROBE_VERSION,
            "spec": as_json(spec.quality),
        }
        write_manifest(staging, manifest | counts)
        directory = layout.quality(spec.name, digest)
        publish(staging, directory)
    record(store, raw, directory, run_id)
    return QualityResult(
        directory=directory, flags=dict(sorted(flags.items())), num_decoded=images.num_decoded, **counts
    )


def reject_reasons(
    spec: DatasetSpec, rows: Iterable[Mapping[str, Any]], index: ImageIndex, images: Images
) -> list[str | None]:
    """Why each sample is rejected, given its row with `TEXT_COLUMNS`; equal reasons are one object."""
    reasons = []
    for number, row in enumerate(rows):
        uses = index.uses_T[index.offsets_S1[number] : index.offsets_S1[number + 1]]
        of_images = [images.reasons[images.reasons_U[use]] for use in uses.tolist()]
        reasons.append(sample_reject_reason(of_images, row, spec))
    return reasons


def _write_samples(
    raw: Path,
    index: ImageIndex,
    images: Images,
    reasons: list[str | None],
    groups: SampleGroups,
    path: Path,
) -> Counter[str]:
    """Write a row per sample, column by column: dictionaries would take three times as long. Counts the flags."""
    counts: Counter[str] = Counter()
    named: dict[int, list[str]] = {}  # the flags of each bit field
    first = 0
    with pq.ParquetWriter(path, SAMPLE_SCHEMA) as writer:
        for texts in read_text_batches(raw, ("sample_id", "row_index", "source_split", "caption"), BATCH_ROWS):
            last = first + len(texts)
            offsets = index.offsets_S1[first : last + 1]
            uses = index.uses_T[offsets[0] : offsets[-1]]
            captions = texts["caption"].to_pylist()
            measured = [measure_caption(caption) for caption in captions]
            flags = [named.setdefault(bits, flag_names(bits)) for bits in _flag_bits(images, uses, offsets)]
            counts.update(chain.from_iterable(flags))
            columns = {
                "sample_id": texts["sample_id"],
                "row_index": texts["row_index"],
                "image_ids": pa.ListArray.from_arrays((offsets - offsets[0]).astype(np.int32), index.ids.take(uses)),
                "source_split": texts["source_split"],
                "caption_sha256": [None if caption is None else sha256(caption.encode()) for caption in captions],
                **{name: [values[name] for values in measured] for name in measured[0]},
                "flags": flags,
                "reject_reason": reasons[first:last],
                "duplicate_group": groups.keys(first, last),
                "group_size": groups.sizes(first, last),
            }
            writer.write_table(pa.table(columns, schema=SAMPLE_SCHEMA))
            first = last
    return counts


def _flag_bits(images: Images, uses: NDArray[np.int32], offsets: NDArray[np.int64]) -> list[int]:
    """All flags of each sample's images; `offsets` are those of `ImageIndex` for these samples."""
    bits = np.zeros(len(offsets) - 1, np.uint32)
    some = np.flatnonzero(np.diff(offsets))
    if len(some):
        bits[some] = np.bitwise_or.reduceat(images.flags_U[uses], (offsets - offsets[0])[some])
    return bits.tolist()


def _write_pairs(raw: Path, index: ImageIndex, pairs: list[SamplePair], path: Path) -> None:
    """Write pairs of samples by their ids, the smaller one first."""
    numbers: NDArray[np.int64] = np.unique([pair.samples for pair in pairs])
    wanted = set(numbers.tolist())
    names = {number: row["sample_id"] for number, row in enumerate(read_texts(raw, ["sample_id"])) if number in wanted}

    def row(pair: SamplePair) -> dict[str, Any]:
        ends = zip((names[sample] for sample in pair.samples), pair.images, strict=True)
        (sample_a, image_a), (sample_b, image_b) = sorted((name, index.ids[image].as_py()) for name, image in ends)
        return {
            "sample_a": sample_a,
            "sample_b": sample_b,
            "image_a": image_a,
            "image_b": image_b,
            "kind": "exact" if image_a == image_b else "near",
            "distance_bits": pair.distance_bits,
            "color_distance": pair.color_distance,
        }

    with pq.ParquetWriter(path, PAIR_SCHEMA) as writer:
        for first in range(0, len(pairs), BATCH_ROWS):
            rows = [row(pair) for pair in pairs[first : first + BATCH_ROWS]]
            writer.write_table(pa.Table.from_pylist(rows, schema=PAIR_SCHEMA))


def _digest(directory: Path, raw_digest: str) -> str:
    """16 hex digits of the source and the rows, independent of Parquet's version and batches."""
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
