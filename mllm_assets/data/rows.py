"""Rows as every source gives them, and how columns of a table become them."""

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mllm_assets.data.spec import SourceSpec
from mllm_assets.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """One sample of a source: undecoded images (b"" where one is missing) and its texts.

    `row_index` is the row's place in the source; `messages` is a whole conversation as JSON, where the source
    has one.
    """

    row_index: int
    images: tuple[bytes, ...]
    caption: str | None = None
    label: str | None = None
    messages: str | None = None


def needed_columns(source: SourceSpec, schema: pa.Schema, where: str) -> list[str]:
    """The columns a spec names.

    Raises:
        DataError: One is not there; names the nearest one and all that are.
    """
    columns = [name for name in (source.image_column, source.caption_column, source.label_column) if name is not None]
    for column in columns:
        if column not in schema.names:
            near = difflib.get_close_matches(column, schema.names, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise DataError(
                f"{where} has no column {column!r}; its columns are {', '.join(schema.names)}. "
                f"{hint}Correct image_column, caption_column or label_column in the dataset's YAML."
            )
    return list(dict.fromkeys(columns))


def class_names(schema: pa.Schema, column: str | None) -> Sequence[str] | None:
    """Names of a Hugging Face ClassLabel column, from the metadata that `datasets` writes into Parquet, or None."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if column is None or raw is None:
        return None
    feature = json.loads(raw).get("info", {}).get("features", {}).get(column, {})
    return feature.get("names") if feature.get("_type") == "ClassLabel" else None


def rows_of_batch(
    batch: pa.RecordBatch, source: SourceSpec, names: Sequence[str] | None, row_indices: Sequence[int], where: str
) -> Iterator[SourceRow]:
    """The rows of one Arrow batch, in order.

    Raises:
        DataError: A value has a type that is no image, caption or label; names the row and column.
    """
    for row_index, row in zip(row_indices, batch.to_pylist(), strict=True):
        place = f"Row {row_index} of {where}"
        yield SourceRow(
            row_index=row_index,
            images=_images(row[source.image_column], f"{place}, column {source.image_column!r}"),
            caption=_text(row, source.caption_column, place),
            label=_label(row, source.label_column, names, place),
        )


def _images(value: Any, place: str) -> tuple[bytes, ...]:
    values = value if isinstance(value, list) else [value]
    images = []
    for item in values:
        if isinstance(item, dict) and "bytes" in item:
            item = item["bytes"]
        if item is not None and not isinstance(item, bytes):
            raise DataError(
                f"{place}: expected image bytes, got {type(item).__name__}. Store the image files' bytes in the "
                "column (the `Image` feature of `datasets` does)."
            )
        images.append(item or b"")
    return tuple(images)


def _text(row: dict[str, Any], column: str | None, place: str) -> str | None:
    value = None if column is None else row[column]
    if value is None or isinstance(value, str):
        return value
    raise DataError(
        f"{place}, column {column!r}: expected a text, got {type(value).__name__}. Name a column of texts as "
        "caption_column (a class goes into label_column)."
    )


def _label(row: dict[str, Any], column: str | None, names: Sequence[str] | None, place: str) -> str | None:
    value = None if column is None else row[column]
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and names is not None:
        # datasets writes -1 where a row has no label
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, int):
        return str(value)
    raise DataError(
        f"{place}, column {column!r}: expected a class or a text, got {type(value).__name__}. Name another "
        "label_column."
    )
