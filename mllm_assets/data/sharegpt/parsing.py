"""Go through an entry's rows. Nearly all of a file are alike, and those are read in a fraction of the time."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mllm_assets.data.sharegpt.conversation import (
    ASSISTANT,
    IMAGE_PLACEHOLDER,
    USER,
    VIDEO_PLACEHOLDER,
    names_pictures,
)
from mllm_assets.data.sharegpt.entries import EntryInfo
from mllm_assets.data.sharegpt.json_text import lone_surrogate
from mllm_assets.data.sharegpt.media import Pictured, media_folders
from mllm_assets.data.sharegpt.pictures import MediaFolders, is_embedded
from mllm_assets.data.sharegpt.row_files import FileRow
from mllm_assets.data.sharegpt.rows import (
    UNSUPPORTED_COLUMNS,
    Message,
    Row,
    parse_row,
    rows_of_entry,
)
from mllm_assets.errors import DataError

MAX_KNOWN_PICTURES = 2**16


def parse_rows(
    data_dir: Path, entry: EntryInfo, media_dir: Path | None = None, folders: MediaFolders | None = None
) -> Iterator[tuple[Row | None, list[str]]]:
    """Each row of an entry's file, or all that is wrong with it; raises as `rows_of_entry`.

    Pictures are looked for in `media_dir` first and then in `data_dir`; nothing outside of the two is read.
    """
    return (parse() for parse in unparsed_rows(data_dir, entry, media_dir, folders))


def unparsed_rows(
    data_dir: Path, entry: EntryInfo, media_dir: Path | None = None, folders: MediaFolders | None = None
) -> Iterator[Callable[[], tuple[Row | None, list[str]]]]:
    """The rows of `parse_rows`, each parsed when it is called: a row that is passed over takes a fifth of the time."""
    if media_dir is not None and not media_dir.is_dir():
        raise DataError(f"media_dir: there is no folder {media_dir}. Correct media_dir, or create the folder.")
    folders = folders or media_folders(data_dir, media_dir)
    folder = Pictured(data_dir, media_dir, folders)
    parse = RowParser(entry, folder)
    for index, row in enumerate(rows_of_entry(data_dir, entry, with_pairs=True)):
        yield partial(parse, row, index)


class RowParser:
    """Reads rows as `parse_row` does: those that are as nearly all are at once, the others by it.

    Args:
        entry: Whose rows they are.
        folder: Where their pictures are; one that was found is not looked for again.
    """

    def __init__(self, entry: EntryInfo, folder: Pictured) -> None:
        self._entry, self._folder = entry, folder
        columns, tags = entry.columns, entry.tags
        self._turns = columns.get("messages", "conversations")
        self._images = columns.get("images")
        self._beside = [
            columns[name] for name in ("system", "tools", "videos", *UNSUPPORTED_COLUMNS) if name in columns
        ]
        self._role, self._content = tags.get("role_tag", "from"), tags.get("content_tag", "value")
        self._speakers = tags.get("user_tag", "human"), tags.get("assistant_tag", "gpt")
        self._has_plain = (
            entry.formatting != "alpaca"
            and not entry.ranking
            and "kto_tag" not in columns
            and tags.get("system_tag") not in self._speakers
        )
        self._found: dict[str, Path] = {}

    def __call__(self, row: FileRow, index: int) -> tuple[Row | None, list[str]]:
        """The row, or None and what is wrong with it."""
        if row.problem is not None:
            return None, [row.problem]
        plain = self._plain(row.value, index) if self._has_plain else None
        if plain is not None:
            return plain, []
        problems: list[str] = []
        return parse_row(row, index, self._entry, self._folder, problems), problems

    def _plain(self, value: Any, index: int) -> Row | None:
        """A row of user and assistant in turn, with a placeholder for each picture; None for any other."""
        if type(value) is not dict or any(map(value.get, self._beside)):
            return None
        messages = self._messages(value.get(self._turns))
        images = self._paths(value.get(self._images)) if self._images is not None else ()
        if messages is None or images is None:
            return None
        if sum(message.content.count(IMAGE_PLACEHOLDER) for message in messages) != len(images):
            return None
        row_id, label = value.get("id"), value.get("label")
        return Row(
            row_id if isinstance(row_id, str) else f"{self._entry.name}[{index}]",
            messages,
            images,
            label if isinstance(label, str) else None,
        )

    def _messages(self, turns: Any) -> tuple[Message, ...] | None:
        if type(turns) is not list or not turns or len(turns) % 2:
            return None
        messages = []
        for number, turn in enumerate(turns):
            if type(turn) is not dict or turn.get(self._role) != self._speakers[number % 2] or "tool_calls" in turn:
                return None
            text = turn.get(self._content)
            if type(text) is not str or not (text.isascii() or lone_surrogate(text) is None):
                return None
            if "<" in text and (
                names_pictures(text) or VIDEO_PLACEHOLDER in text or (number % 2 and IMAGE_PLACEHOLDER in text)
            ):
                return None
            messages.append(Message(ASSISTANT if number % 2 else USER, text))
        return tuple(messages)

    def _paths(self, names: Any) -> tuple[Path, ...] | None:
        if type(names) is not list:
            return () if names is None else None
        paths = []
        for name in names:
            path = self._found.get(name) if type(name) is str else None
            if path is None:
                if type(name) is not str or is_embedded(name):
                    return None
                path, _ = self._folder.folders.find(name)
                if path is None:
                    return None
                if len(self._found) >= MAX_KNOWN_PICTURES:
                    self._found.clear()
                self._found[name] = path
            paths.append(path)
        return tuple(paths)
