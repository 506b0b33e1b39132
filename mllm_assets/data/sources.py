"""Ingest: any source at a pinned revision becomes one Parquet file of undecoded images, named by its content."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.artifacts import find_damage, is_complete, publish, read_manifest, staging_directory, write_manifest
from mllm_assets.data.fixed_splits import guide_places
from mllm_assets.data.hub import read_hub
from mllm_assets.data.image_folder import read_image_folder
from mllm_assets.data.images import sha256
from mllm_assets.data.llamafactory import read_llamafactory
from mllm_assets.data.rows import SourceRow, encodable
from mllm_assets.data.spec import DatasetSpec, SplitSpec, as_json
from mllm_assets.data.tables import read_tables
from mllm_assets.data.webdataset import read_webdataset
from mllm_assets.errors import DataError, IntegrityError
from mllm_assets.hub import is_commit
from mllm_assets.layout import Layout

SAMPLES_FILE = "samples.parquet"
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
    ]
)
READERS = {
    "parquet": read_tables,
    "arrow": read_tables,
    "image_folder": read_image_folder,
    "webdataset": read_webdataset,
    "llamafactory": read_llamafactory,
}
# Image files are compressed already, and a dictionary or a minimum of them helps nobody.
_TEXTS = [field.name for field in RAW_SCHEMA if field.name not in ("images", "image_ids")]
_WRITER_OPTIONS: dict[str, Any] = {
    "compression": {**dict.fromkeys([*_TEXTS, "image_ids.list.element"], "zstd"), "images.list.element": "none"},
    "use_dictionary": _TEXTS,
    "write_statistics": _TEXTS,
    "write_page_checksum": True,
}
# One Arrow binary array holds at most 2 GiB; a row group is closed far below it.
ROW_GROUP_BYTES = 16 * 2**20
ROW_GROUP_ROWS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class RawDataset:
    """An ingested source: where it lies, what it holds and the revision it came from."""

    directory: Path
    digest: str
    num_samples: int
    revision: str | None
    num_bytes: int


def ingest(spec: DatasetSpec, layout: Layout, *, hub_endpoint: str | None = None) -> RawDataset:
    """Copy a source's samples, images undecoded, into `data/.raw/<dataset>/<digest>/`.

    The digest covers ids, order, images, texts and where they were found: the same input gives the same bytes, digest
    and directory. A commit of the Hub that was read before for the same splits is not read again. `hub_endpoint` names
    another Hub than the default one.

    Raises:
        SourceError: The Hub cannot be reached or refuses; says what to do.
        DataError: The source's file, columns or types do not fit the spec, or it has no rows.
    """
    source = spec.source
    places = _GuidePlaces(spec.split) if spec.split.strategy == "guide" else None
    if source.kind == "huggingface":
        if is_commit(source.revision) and (stored := _find_ingested(spec, layout, source.revision)):
            return stored
        revision, rows = read_hub(spec, endpoint=hub_endpoint, choose=places.choose if places else None)
        if stored := _find_ingested(spec, layout, revision):
            return stored
    else:
        revision, rows = None, READERS[source.kind](source, layout.root)
    with staging_directory(layout.raw(spec.name, "new").parent) as staging:
        num_samples, digest = _write_samples(rows, staging / SAMPLES_FILE)
        if num_samples == 0:
            raise DataError(f"The source of dataset {spec.name!r} has no rows. Check source.path, repo and split.")
        num_bytes = (staging / SAMPLES_FILE).stat().st_size
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
    return RawDataset(
        directory=directory, digest=digest, num_samples=num_samples, revision=revision, num_bytes=num_bytes
    )


class _GuidePlaces:
    """Of a Hub dataset the guide's shuffle needs the number of all rows, but only the rows that it takes."""

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
        if not is_complete(directory) or find_damage(directory, deep=False):
            continue
        manifest = read_manifest(directory)
        found = [
            {**manifest["source"], "revision": None},
            *(manifest.get(key) for key in ("revision", "split", "columns")),
        ]
        if found == [wanted, commit, as_json(spec.split), RAW_SCHEMA.names]:
            return RawDataset(
                directory=directory,
                digest=manifest["digest"],
                num_samples=manifest["num_samples"],
                revision=commit,
                num_bytes=manifest["files"][SAMPLES_FILE]["num_bytes"],
            )
    return None


def sample_content_id(row: SourceRow, image_ids: list[str]) -> str:
    """16 hex digits of what a sample is: its images and texts, not its place."""
    content = json.dumps([image_ids, row.caption, row.label, row.messages], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def raw_row(row: SourceRow, seen: Counter[str]) -> dict[str, Any]:
    """The columns of `RAW_SCHEMA`; `seen` counts the samples of each content, which have ids of their own."""
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
    }


def read_raw(raw: Path) -> Iterator[dict[str, Any]]:
    """The rows of an ingested source one by one; only one row group is in memory.

    Raises:
        IntegrityError: The file is missing, or a page does not match its checksum.
    """
    path = raw / SAMPLES_FILE
    try:
        # pre-buffering would keep what was read until the file is closed
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            for group in range(file.num_row_groups):  # no batch is larger than a row group then
                for batch in file.iter_batches(batch_size=64, row_groups=[group]):
                    yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        cause = str(error).splitlines()[0]
        raise IntegrityError(
            f"{path} is damaged ({cause}). Delete {raw} and materialise the raw asset again."
        ) from error


def _write_samples(rows: Iterator[SourceRow], path: Path) -> tuple[int, str]:
    seen: Counter[str] = Counter()
    digest = hashlib.sha256(" ".join(RAW_SCHEMA.names).encode())  # another layout is another directory
    pending: list[dict[str, Any]] = []
    num_pending_bytes = 0
    with pq.ParquetWriter(path, RAW_SCHEMA, **_WRITER_OPTIONS) as writer:
        for row in rows:
            values = raw_row(row, seen)
            facts = ("sample_id", "row_index", "source_split", "source_defect", "source_location")
            digest.update(f"{' '.join(str(values[name]) for name in facts)}\n".encode())
            pending.append(values)
            num_pending_bytes += sum(map(len, values["images"]))
            if num_pending_bytes >= ROW_GROUP_BYTES or len(pending) >= ROW_GROUP_ROWS:
                writer.write_table(pa.Table.from_pylist(pending, schema=RAW_SCHEMA))
                pending, num_pending_bytes = [], 0
        if pending:
            writer.write_table(pa.Table.from_pylist(pending, schema=RAW_SCHEMA))
    return seen.total(), digest.hexdigest()[:16]
