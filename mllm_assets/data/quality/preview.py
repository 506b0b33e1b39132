"""A few ordinary rows with their pictures, as a table for an asset's metadata."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from mllm_assets.data.ingest.raw_files import open_raw
from mllm_assets.data.ingest.spec import DecodeLimits
from mllm_assets.data.quality.decoding import measure_images
from mllm_assets.data.quality.report import markdown_table, thumbnail
from mllm_assets.data.quality.verdicts import texts_of
from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER, read_conversation
from mllm_assets.data.sharegpt.row_files import read_rows
from mllm_assets.errors import DataError

NUM_ROWS = 8
MAX_READ = 10_000  # rows of a split: about half a second
MAX_PICTURES, THUMBNAIL_PX = 2, 72  # of a row
SMALL_BYTES = 4096  # a picture that is shown as it is
MAX_BYTES = 2**25  # of a picture that is looked at
SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}


def preview_source(raw: Path, limits: DecodeLimits) -> str:
    """Rows of an ingested source, evenly spaced. Nothing was judged yet: a picture that cannot be decoded is named."""
    rows = list(_evenly_spaced(raw))
    lines = []
    for row in rows:
        pictures = sorted(_untrusted(data, limits) for data in row["images"][:MAX_PICTURES])  # a defect comes last
        texts = [f"{name}: {text}" for name, text in texts_of(row).items() if text]
        if row["messages"] is not None:
            texts += [f"{turn['role']}: {turn['content']}" for turn in read_conversation(row["messages"])]
        if row["source_defect"] is not None:
            texts.append(f"cannot be used: {row['source_defect']}")
        lines.append((" ".join(pictures), " / ".join(texts), row["source_location"]))
    return markdown_table(("row", "texts", "where"), lines)


def preview_rows(file: Path, data_dir: Path, num_rows: int) -> str:
    """Rows of a split of `num_rows`, evenly spaced: a source often has one class after the other."""
    lines, wanted = [], _places(min(num_rows, MAX_READ))
    for number, row in enumerate(islice(read_rows(file), max(wanted, default=-1) + 1)):
        if number not in wanted:
            continue
        pictures = [_trusted(data_dir / name) for name in row["images"][:MAX_PICTURES]]
        lines.append((" ".join(pictures), _said(row["messages"], "user"), _said(row["messages"], "assistant")))
    return markdown_table(("row", "asked", "answer"), lines)


def _places(num_rows: int) -> list[int]:
    return sorted({number * num_rows // NUM_ROWS for number in range(NUM_ROWS)}) if num_rows else []


def _evenly_spaced(raw: Path) -> Iterator[dict[str, Any]]:
    """Rows of each part of a source; only their row groups are read, one at a time."""
    with open_raw(raw) as file:
        num_rows = file.metadata.num_rows
        wanted = _places(num_rows)
        first = 0
        for group in range(file.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            if here := [number - first for number in wanted if first <= number < last]:
                rows = file.read_row_group(group)
                yield from (rows.slice(number, 1).to_pylist()[0] for number in here)
            first = last


def _untrusted(data: bytes, limits: DecodeLimits) -> str:
    """A picture as it is if it is small; a larger one is made small if another process could decode it."""
    kind = next((kind for signature, kind in SIGNATURES.items() if data.startswith(signature)), None)
    if kind and len(data) <= SMALL_BYTES:
        return f"![](data:image/{kind};base64,{base64.b64encode(data).decode()})"
    if len(data) > min(MAX_BYTES, limits.max_bytes):
        return "image_too_many_bytes"
    [measured] = measure_images([data], limits)
    return measured.defect or f"![]({thumbnail(data, THUMBNAIL_PX)})"


def _trusted(path: Path) -> str:
    with suppress(DataError):  # changed since it was published, which the asset's checks say
        return f"![]({thumbnail(path, THUMBNAIL_PX)})"
    return "unreadable"


def _said(messages: Sequence[Mapping[str, str]], role: str) -> str:
    return " / ".join(
        turn["content"].replace(IMAGE_PLACEHOLDER, "").strip() for turn in messages if turn["role"] == role
    )
