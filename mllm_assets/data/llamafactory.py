"""Bring in a LLaMA-Factory directory as it is: the rows of its entries with their conversations and images."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm_assets.data.conversation import as_conversation
from mllm_assets.data.dataset_info import Entry, entry_file, load_entries, load_entry
from mllm_assets.data.image_folder import read_images
from mllm_assets.data.paths import find_folder
from mllm_assets.data.row_files import FileRow, file_rows
from mllm_assets.data.rows import Images, SourceRow, conversation_row, unreadable_row
from mllm_assets.data.sharegpt import ASSISTANT, SYSTEM, USER, entry_problems, turns_of
from mllm_assets.data.spec import SourceSpec
from mllm_assets.errors import DataError

_ROLE_TAGS = {"user_tag": USER, "assistant_tag": ASSISTANT, "system_tag": SYSTEM}


def read_llamafactory(source: SourceSpec, root: Path) -> Iterator[SourceRow]:
    """Rows of the entry `split`, and after them those of `val_split`.

    A row that LLaMA-Factory would drop or trip over is given with its defect, so that it is counted.

    Raises:
        DataError: The folder has no `dataset_info.json`, an entry cannot be trained on, or its file cannot be read.
        RecipeError: No entry of that name; names the nearest.
    """
    folder = find_folder(source, root)
    index = 0
    for side, entry in _entries(source, folder):
        for problem in entry_problems(entry):
            raise DataError(f"{folder}: {problem}")
        for row in file_rows(entry_file(folder, entry)):
            if row.problem is not None or not isinstance(row.value, dict):
                yield unreadable_row(index, row.location(folder), source_split=side)
            else:
                yield _read_row(row, entry, folder, index, side)
            index += 1


def _entries(source: SourceSpec, folder: Path) -> list[tuple[str | None, Entry]]:
    if source.val_split is not None:
        return [("train", load_entry(folder, source.split)), ("val", load_entry(folder, source.val_split))]
    entries = load_entries(folder)
    if source.split not in entries and len(entries) == 1:
        return [(None, next(iter(entries.values())))]
    return [(None, load_entry(folder, source.split))]


def _read_row(row: FileRow, entry: Entry, folder: Path, index: int, side: str | None) -> SourceRow:
    value: Mapping[str, Any] = row.value
    turns, tags = turns_of(value, entry)
    roles = {tags[tag]: role for tag, role in _ROLE_TAGS.items() if tag in tags}
    role_tag, content_tag = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    if isinstance(turns, list):
        turns = [
            {"role": roles.get(turn[role_tag], turn[role_tag]), "content": turn[content_tag]}
            if isinstance(turn, dict) and isinstance(turn.get(role_tag), str) and content_tag in turn
            else turn
            for turn in turns
        ]
    images, defect = _images(value.get(entry.columns.get("images", "")), folder)
    messages = as_conversation(turns, system=value.get(entry.columns.get("system", "")))
    label = value.get("label")
    return conversation_row(
        messages,
        row_index=index,
        location=row.location(folder),
        images=images,
        label=label if isinstance(label, str) else None,
        source_split=side,
        defect=defect,
    )


def _images(value: Any, folder: Path) -> tuple[Images, str | None]:
    """Images of a row: paths below the folder, or bytes that a Parquet file embeds."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    images: list[bytes | None] = []
    for item in values:
        data = item.get("bytes") if isinstance(item, dict) else item
        if isinstance(data, str):
            [data], defect = read_images(folder, [data])
            if defect is not None:
                return (), defect
        elif not isinstance(data, bytes):
            return (), "image_unreadable"
        images.append(data)
    return tuple(images), None
