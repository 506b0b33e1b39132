"""Ingest: any source at a pinned revision becomes one Parquet file of undecoded images, named by its content."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.artifacts import is_sound, publish, read_manifest, staging_directory, write_manifest
from mllm_assets.data.ingest.hub import read_hub
from mllm_assets.data.ingest.images import sha256
from mllm_assets.data.ingest.kinds import KINDS
from mllm_assets.data.ingest.paths import is_watchable, require_same_source, source_states
from mllm_assets.data.ingest.raw_files import SAMPLES_FILE
from mllm_assets.data.ingest.sides import read_sides
from mllm_assets.data.ingest.source_rows import SourceRow, encodable
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec, as_json
from mllm_assets.data.ingest.split_spec import SplitSpec, guide_places
from mllm_assets.errors import DataError
from mllm_assets.hub.client import is_commit
from mllm_assets.layout import Layout
from mllm_assets.plugins import resolve
from mllm_assets.progress import doing, followed
from mllm_assets.settings import number

RAW_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("row_index", pa.int64(), nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),
        pa.field("image_ids", pa.list_(pa.string()), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("label", pa.string()),
        pa.field("messages", pa.string()),
        pa.field("source_split", pa.string()),
        pa.field("source_defect", pa.string()),
        pa.field("source_location", pa.string(), nullable=False),
        pa.field("source_id", pa.string()),
        pa.field("source_detail", pa.string()),
        pa.field("fields", pa.string()),
    ]
)
# Image files are compressed already; dictionaries and statistics of them are useless.
_TEXTS = [field.name for field in RAW_SCHEMA if field.name not in ("images", "image_ids")]
_WRITER_OPTIONS: dict[str, Any] = {
    "compression": {**dict.fromkeys([*_TEXTS, "image_ids.list.element"], "zstd"), "images.list.element": "none"},
    "use_dictionary": _TEXTS,
    "write_statistics": _TEXTS,
    "write_page_checksum": True,
}
# of one source together, and what they count; variables of the environment
GIB = 2**30
BOUNDS = {
    "MLLM_ASSETS_MAX_SOURCE_ROWS": (10_000_000, "rows"),
    "MLLM_ASSETS_MAX_SOURCE_GIB": (1024, "GiB of images and texts"),
    "MLLM_ASSETS_MAX_SOURCE_HOURS": (24, "hours of reading"),
}
# One Arrow binary array holds at most 2 GiB; a row group is closed far below it.
ROW_GROUP_BYTES = 16 * 2**20
ROW_GROUP_ROWS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class RawDataset:
    """An ingested source: where it is, what it holds and the revision it came from."""

    directory: Path
    digest: str
    num_samples: int
    revision: str | None
    num_bytes: int


@doing("ingest the source")
def ingest(spec: DatasetSpec, layout: Layout, *, hub_endpoint: str | None = None) -> RawDataset:
    """Copy a source's samples, images undecoded, into `data/.raw/<dataset>/<digest>/`.

    The digest covers ids, order, images, texts and where they were found: the same input gives the same bytes, digest
    and directory. A Hub commit that was read before for the same splits is not read again. `hub_endpoint` names
    another Hub than the default one.

    Raises:
        SourceError: The Hub cannot be reached or refuses; says what to do.
        DataError: The source's file, columns or types do not fit the spec, it has no rows, or it changed meanwhile.
    """
    source = spec.source
    places = _GuidePlaces(spec.split) if spec.split.strategy == "guide" else None
    if source.is_of_hub:
        if is_commit(source.revision) and (stored := _find_ingested(spec, layout, source.revision)):
            return stored
        revision, rows = read_hub(spec, endpoint=hub_endpoint, choose=places.choose if places else None)
        rows = _bounded(rows, source.repo)
        if stored := _find_ingested(spec, layout, revision):
            return stored
    else:
        revision, rows = None, read_source(source, layout.root)
    states = source_states(source, layout.root) if is_watchable(source) else {}
    with staging_directory(layout.raw(spec.name, "new").parent) as staging:
        num_samples, digest = _write_samples(rows, staging / SAMPLES_FILE)
        if num_samples == 0:
            raise DataError(f"The source of dataset {spec.name!r} has no rows. Check source.path, repo and split.")
        if states:
            require_same_source(states, source, layout.root)
        write_manifest(
            staging,
            {
                "kind": "raw",
                "dataset": spec.name,
                "digest": digest,
                "num_samples": num_samples,
                "num_source_rows": places.num_rows if places and places.num_rows else num_samples,
                "revision": revision,
                "source": as_json(source),
                "split": as_json(spec.split),
                "columns": RAW_SCHEMA.names,
            },
        )
        directory = layout.raw(spec.name, digest)
        publish(staging, directory)
    return _raw_dataset(directory, revision)


def read_source(source: SourceSpec, root: Path) -> Iterator[SourceRow]:
    """The rows of a source of any kind but the Hub.

    Raises:
        DataError: Its files do not fit the spec.
    """
    read = KINDS[source.kind].read
    assert read is not None, "the Hub is read at a commit"
    rows = read_sides(source, root, resolve(read) if isinstance(read, str) else read)
    return _bounded(rows, ", ".join(source.paths))


def _bounded(rows: Iterator[SourceRow], what: str) -> Iterator[SourceRow]:
    """Rows as long as the source, all of it together, is within `BOUNDS`.

    Raises:
        DataError: It is not. Names the variable to raise.
    """
    limits = [number(name, default, least=1, kind=int) for name, (default, _) in BOUNDS.items()]
    started_s, num_bytes = time.monotonic(), 0
    for num_rows, row in enumerate(rows, 1):
        num_bytes += sum(len(data) for data in row.images if data) + len(row.messages or row.caption or "")
        found = (num_rows, num_bytes / GIB, (time.monotonic() - started_s) / 3600)
        for name, value, limit in zip(BOUNDS, found, limits, strict=True):
            if value > limit:
                unit = BOUNDS[name][1]
                raise DataError(
                    f"The source {what} has more than {limit:,} {unit}, where reading stopped. Set {name} higher "
                    "if it should be that large."
                )
        yield row


class _GuidePlaces:
    """The guide's shuffle of a Hub dataset: it needs the number of all rows, but only the rows that it takes."""

    def __init__(self, split: SplitSpec) -> None:
        self._split = split
        self.num_rows = 0

    def choose(self, num_rows: int) -> Collection[int]:
        self.num_rows = num_rows
        return guide_places(num_rows, self._split).keys()


def _find_ingested(spec: DatasetSpec, layout: Layout, commit: str | None) -> RawDataset | None:
    """What an earlier run read from a commit with the same columns, for splits of the same sizes."""
    wanted = {**as_json(spec.source), "revision": None}
    for directory in sorted(layout.raw(spec.name, "any").parent.glob("*")):
        if not is_sound(directory):
            continue
        manifest = read_manifest(directory)
        found = [
            {**manifest["source"], "revision": None},
            *(manifest.get(key) for key in ("revision", "split", "columns")),
        ]
        if found == [wanted, commit, as_json(spec.split), RAW_SCHEMA.names]:
            return _raw_dataset(directory, commit)
    return None


def _raw_dataset(directory: Path, revision: str | None) -> RawDataset:
    manifest = read_manifest(directory)
    return RawDataset(
        directory=directory,
        digest=manifest["digest"],
        num_samples=manifest["num_samples"],
        revision=revision,
        num_bytes=manifest["files"][SAMPLES_FILE]["num_bytes"],
    )


def sample_content_id(row: SourceRow, image_ids: list[str]) -> str:
    """16 hex digits of a sample's images and texts, not of its position."""
    fields = [dict(row.fields)] if row.fields else []
    content = json.dumps([image_ids, row.caption, row.label, row.messages, *fields], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def raw_row(row: SourceRow, seen: Counter[str]) -> dict[str, Any]:
    """The columns of `RAW_SCHEMA`; `seen` counts the samples of equal content, so that each gets an id of its own."""
    images = [data or b"" for data in row.images]
    image_ids = [sha256(data) for data in images]
    content_id = sample_content_id(row, image_ids)
    seen[content_id] += 1
    repeat = seen[content_id]
    return {
        "sample_id": content_id if repeat == 1 else f"{content_id}-{repeat}",
        "row_index": row.row_index,
        "images": images,
        "image_ids": image_ids,
        "caption": row.caption,
        "label": row.label,
        "messages": row.messages,
        "source_split": row.source_split,
        "source_defect": row.defect or ("image_missing" if None in row.images else None),
        "source_location": encodable(row.location),
        "source_id": row.source_id,
        "source_detail": row.detail,
        "fields": json.dumps(dict(row.fields)) if row.fields else None,
    }


def _write_samples(rows: Iterator[SourceRow], path: Path) -> tuple[int, str]:
    seen: Counter[str] = Counter()
    digest = hashlib.sha256(" ".join(RAW_SCHEMA.names).encode())  # other columns, another directory
    pending: list[dict[str, Any]] = []
    num_pending_bytes = 0
    with pq.ParquetWriter(path, RAW_SCHEMA, **_WRITER_OPTIONS) as writer:
        for row in followed(rows, "ingest rows"):
            values = raw_row(row, seen)
            facts = ("sample_id", "row_index", "source_split", "source_defect", "source_location", "source_id")
            digest.update(f"{' '.join(str(values[name]) for name in facts)}\n".encode())
            pending.append(values)
            num_pending_bytes += sum(map(len, values["images"]))
            if num_pending_bytes >= ROW_GROUP_BYTES or len(pending) >= ROW_GROUP_ROWS:
                writer.write_table(pa.Table.from_pylist(pending, schema=RAW_SCHEMA))
                pending, num_pending_bytes = [], 0
        if pending:
            writer.write_table(pa.Table.from_pylist(pending, schema=RAW_SCHEMA))
    return seen.total(), digest.hexdigest()[:16]
