"""Rows as every source gives them, and how columns of a table become them."""

import difflib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mllm_assets.data.arrow_values import rows_of
from mllm_assets.data.conversation import answers_of, as_conversation
from mllm_assets.data.spec import SourceSpec
from mllm_assets.errors import DataError

Images = tuple[bytes | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """One sample of a source: undecoded images (None where one is missing) and its texts.

    `row_index` is the row's place in the source, `location` the same for people (see `paths.location_of`); `messages`
    is a whole conversation as JSON (see `conversation`), where the source has one; `source_split` is "train" or "val"
    where the source is split already; `defect` is a reason slug for a row that the source itself cannot give whole.
    """

    row_index: int
    location: str
    images: Images
    caption: str | None = None
    label: str | None = None
    messages: str | None = None
    source_split: str | None = None
    defect: str | None = None


def needed_columns(source: SourceSpec, schema: pa.Schema, where: str) -> list[str]:
    """The columns a spec names.

    Raises:
        DataError: One is not there; names the nearest one and all that are.
    """
    # a caption or label beside whole conversations is not looked at, so the default names need not be there
    texts = (source.messages_column,) if source.messages_column else (source.caption_column,)
    columns = [name for name in (source.image_column, *texts, source.label_column) if name is not None]
    _require_columns(columns, schema.names, where)
    return list(dict.fromkeys(columns))


def require_named(source: SourceSpec, found: Collection[str], where: str) -> None:
    """Refuse a file without a schema of which no row has a column that the spec names: one row may lack it, not all.

    Args:
        source: What names the columns. Defaults need not be there: an image may be named in another way, and beside
            a label or a conversation no caption is needed.
        found: The columns of all rows.
        where: What the error calls the file.

    Raises:
        DataError: As `needed_columns`.
    """
    optional = {"image"} | ({"text"} if source.label_column or source.messages_column else set())
    columns = (source.image_column, source.caption_column, source.label_column, source.messages_column)
    _require_columns([column for column in columns if column is not None and column not in optional], found, where)


def _require_columns(columns: Iterable[str], found: Collection[str], where: str) -> None:
    for column in columns:
        if column not in found:
            near = difflib.get_close_matches(column, found, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise DataError(
                f"{where} has no column {column!r}; its columns are {', '.join(found)}. "
                f"{hint}Correct image_column, caption_column, label_column or messages_column in the dataset's YAML."
            )


def class_names(schema: pa.Schema, column: str | None) -> Sequence[str] | None:
    """Names of a Hugging Face ClassLabel column, from the metadata that `datasets` writes into Parquet, or None."""
    raw = (schema.metadata or {}).get(b"huggingface")
    if column is None or raw is None:
        return None
    feature = json.loads(raw).get("info", {}).get("features", {}).get(column, {})
    return feature.get("names") if feature.get("_type") == "ClassLabel" else None


def rows_of_batch(
    batch: pa.RecordBatch,
    source: SourceSpec,
    names: Sequence[str] | None,
    row_indices: Sequence[int],
    locations: Sequence[str],
) -> Iterator[SourceRow]:
    """The rows of one Arrow batch, in order.

    Raises:
        DataError: A value has a type that is no image, caption or label; names the row and column.
    """
    for row_index, location, row in zip(row_indices, locations, rows_of(batch), strict=True):
        images = _images(row[source.image_column], f"{location}, column {source.image_column!r}")
        yield row_of_values(row, images, source, row_index, location, names=names)


def row_of_values(
    values: Mapping[str, Any],
    images: Images,
    source: SourceSpec,
    row_index: int,
    location: str,
    *,
    names: Sequence[str] | None = None,
    **fields: Any,
) -> SourceRow:
    """A row of named values: the conversation where the spec names one, otherwise caption and label.

    Raises:
        DataError: A value has a type that is no caption or label; names the row and column.
    """
    label = _label(values, source.label_column, names, location)
    fields |= {"row_index": row_index, "location": location, "images": images, "label": label}
    if source.messages_column is not None:
        return conversation_row(as_conversation(values.get(source.messages_column)), **fields)
    return SourceRow(caption=_text(values, source.caption_column, location), **fields)


def loose_row(
    values: Mapping[str, Any], images: Images, source: SourceSpec, row_index: int, location: str, defect: str | None
) -> SourceRow:
    """A row of values that no schema holds together: a caption or label of a wrong type is a defect of this row."""
    try:
        return row_of_values(values, images, source, row_index, location, defect=defect)
    except DataError:
        defect = defect or "caption_unreadable"
        return SourceRow(row_index=row_index, location=location, images=images, defect=defect)


def unreadable_row(row_index: int, location: str, defect: str = "row_unreadable", **fields: Any) -> SourceRow:
    """A row of which nothing is known but where it is."""
    return SourceRow(row_index=row_index, location=location, images=(), defect=defect, **fields)


def conversation_row(messages: str, **fields: Any) -> SourceRow:
    """A row that holds a whole conversation; its answers stand as the caption, which is what statistics are about."""
    return SourceRow(caption=encodable(answers_of(messages)), messages=messages, **fields)


def _images(value: Any, place: str) -> Images:
    values = value if isinstance(value, list) else [value]
    images: list[bytes | None] = []
    for item in values:
        if isinstance(item, dict) and "bytes" in item:
            item = item["bytes"]
        if item is not None and not isinstance(item, bytes):
            raise DataError(
                f"{place}: expected image bytes, got {type(item).__name__}. Store the image files' bytes in the "
                "column (the `Image` feature of `datasets` does)."
            )
        images.append(item)
    return tuple(images)


def _text(row: Mapping[str, Any], column: str | None, place: str) -> str | None:
    value = None if column is None else row.get(column)
    if value is None or isinstance(value, str):
        return None if value is None else encodable(value)
    raise DataError(
        f"{place}, column {column!r}: expected a text, got {type(value).__name__}. Name a column of texts as "
        "caption_column (a class goes into label_column)."
    )


def _label(row: Mapping[str, Any], column: str | None, names: Sequence[str] | None, place: str) -> str | None:
    value = None if column is None else row.get(column)
    if value is None or isinstance(value, str):
        return None if value is None else encodable(value)
    if isinstance(value, int) and names is not None:
        # datasets writes -1 where a row has no label
        return names[value] if 0 <= value < len(names) else None
    if isinstance(value, int):
        return str(value)
    raise DataError(
        f"{place}, column {column!r}: expected a class or a text, got {type(value).__name__}. Name another "
        "label_column."
    )


def encodable(text: str) -> str:
    """JSON and file names can hold what is no character: it becomes U+FFFD, and `tokens.text_defect` finds it."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
