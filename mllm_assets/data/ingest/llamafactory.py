"""Read a LLaMA-Factory directory: the rows of its entries with their conversations and images."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mllm_assets.data.ingest.paths import find_folder, find_media
from mllm_assets.data.ingest.source_rows import SourceRow, encodable, with_conversation
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.data.ingest.split_spec import SIDES
from mllm_assets.data.sharegpt.conversation import FUNCTION, OBSERVATION, as_conversation
from mllm_assets.data.sharegpt.entries import EntryInfo, load_entries, load_entry
from mllm_assets.data.sharegpt.pictures import MediaFolders, read_pictures
from mllm_assets.data.sharegpt.row_files import FileRow
from mllm_assets.data.sharegpt.rows import RowProblem, read_messages, rows_of_entry, turns_of
from mllm_assets.data.sharegpt.tool_turns import tools_of


def read_llamafactory(source: SourceSpec, root: Path) -> Iterator[SourceRow]:
    """Rows of the entry `split`, then those of `val_split` and `test_split`.

    A row that LLaMA-Factory would drop or fail on is kept with its defect, so that it is counted.

    Raises:
        DataError: The folder has no `dataset_info.json`, or an entry or its file cannot be used.
        RecipeError: No entry has that name; names the nearest.
    """
    folder = find_folder(source, root)
    media = MediaFolders(find_media(source, root), (folder,))
    index = 0
    for side, entry in _entries(source, folder):
        for row in rows_of_entry(folder, entry):
            if row.problem is not None or not isinstance(row.value, dict):
                yield SourceRow(
                    row_index=index,
                    location=row.location(folder),
                    source_split=side,
                    defect="row_unreadable",
                    detail=row.problem or f"expected an object, got {type(row.value).__name__}",
                )
            else:
                at = SourceRow(row_index=index, location=row.location(folder), source_split=side)
                yield _read_row(row, entry, media, at)
            index += 1


def _entries(source: SourceSpec, folder: Path) -> list[tuple[str | None, EntryInfo]]:
    if source.val_split is not None:
        named = zip(SIDES, (source.split, source.val_split, source.test_split), strict=True)
        return [(side, load_entry(folder, name)) for side, name in named if name is not None]
    entries = load_entries(folder)
    if source.split not in entries and len(entries) == 1:
        return [(None, next(iter(entries.values())))]
    return [(None, load_entry(folder, source.split))]


def _read_row(row: FileRow, entry: EntryInfo, media: MediaFolders, at: SourceRow) -> SourceRow:
    value: Mapping[str, Any] = row.value
    messages, in_parts, problems = read_messages(value, entry, row.place)
    tools = tools_of(value.get(entry.columns["tools"])) if "tools" in entry.columns else ""
    if tools not in ("", "[]") or any(message.role in (OBSERVATION, FUNCTION) for message in messages):
        text = (
            f"{row.place}: a declared dataset has no tools. Name the entry in the recipe as it is, with its "
            "dataset_dir, or take the row out."
        )
        problems = [*problems, RowProblem("tools_unsupported", text)]
    if (videos := value.get(entry.columns.get("videos", ""))) and videos != "[]":
        text = (
            f"{row.place}: a declared dataset has no videos. Name the entry in the recipe as it is, with its "
            "dataset_dir, or take the row out."
        )
        problems = [*problems, RowProblem("videos_unsupported", text)]
    pictures = read_pictures(value.get(entry.columns.get("images", "")), media)
    pictures += read_pictures(list(in_parts) or None, media)
    turns = [asdict(message) for message in messages] if not problems else turns_of(value, entry)[0]
    label, row_id = value.get("label"), value.get("id")
    at = replace(
        at,
        images=pictures.images,
        files=pictures.files,
        label=label if isinstance(label, str) else None,
        source_id=encodable(str(row_id)) if isinstance(row_id, str | int) else None,
        defect=problems[0].reason if problems else pictures.defect,
        detail=problems[0].text if problems else pictures.looked_for,
    )
    return with_conversation(at, as_conversation(turns).messages)
