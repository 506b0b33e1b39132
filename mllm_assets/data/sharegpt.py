"""Read ShareGPT files as LLaMA-Factory does, but refuse at once, by row, what it drops or trips over while training."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import digest_json, path_inside, sha256_file
from mllm_assets.data.dataset_info import DATASET_INFO, Entry, entry_file, load_entry
from mllm_assets.data.json_text import decode, lone_surrogate, read_text, text_lines
from mllm_assets.data.tokens import IMAGE_PLACEHOLDER
from mllm_assets.errors import DataError

USER = "user"
ASSISTANT = "assistant"
SYSTEM = "system"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `role` is "system", "user" or "assistant" whatever the file's tags are."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One sample: at most one leading system message, then user and assistant in turn; absolute image paths."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[Path, ...]
    label: str | None = None


def load_rows(data_dir: Path, entry_name: str, *, max_samples: int | None = None) -> list[Row]:
    """Read and validate the rows of an entry of `data_dir/dataset_info.json`.

    Args:
        data_dir: LLaMA-Factory's `dataset_dir`; image paths are relative to it.
        entry_name: A name in `dataset_info.json`.
        max_samples: Only the first so many rows.

    Raises:
        RecipeError: No such entry; names the nearest.
        DataError: The file is not JSON (names the line), or a row's roles, placeholders or images are wrong (names
            file, row and id).
    """
    entry = load_entry(data_dir, entry_name)
    path = entry_file(data_dir, entry)
    rows = []
    for index, value in enumerate(_read_values(path, entry)):
        if max_samples is not None and index >= max_samples:
            break
        rows.append(_parse_row(value, index, entry, path, data_dir))
    if not rows:
        raise DataError(
            f"{path} has no rows, but entry {entry_name!r} names it. Add samples or take it out of the recipe."
        )
    return rows


def entry_digest(data_dir: Path, entry_name: str) -> str:
    """16 hex digits that cover an entry, its file and every image it names."""
    entry = load_entry(data_dir, entry_name)
    path = entry_file(data_dir, entry)
    images = {image for row in load_rows(data_dir, entry_name) for image in row.images}
    digests = [sha256_file(image) for image in sorted(images)]  # by name: two pictures that change places count
    block = {"formatting": entry.formatting, "columns": dict(entry.columns), "tags": dict(entry.tags)}
    return digest_json([block, sha256_file(path), digests])[:16]


def read_json_rows(path: Path) -> list[Any]:
    """The values of a `.json` (one list) or `.jsonl` (one value a line) file.

    Raises:
        DataError: Missing, not UTF-8, not JSON (names the line) or not a list.
    """
    try:
        if path.suffix == ".jsonl":
            return [decode(line, path, number) for number, line in text_lines(path)]
        values = decode(read_text(path), path, 1)
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(
            f"There is no file {path}. Materialise its dataset, or correct `file_name` in {DATASET_INFO}."
        ) from None
    if not isinstance(values, list):
        raise DataError(
            f"{path}: expected a list of rows, got {type(values).__name__}. Put the rows into one JSON list."
        )
    return values


def _read_values(path: Path, entry: Entry) -> Iterator[Any]:
    if entry.formatting != "sharegpt":
        raise DataError(
            f"Entry {entry.name!r} has the formatting {entry.formatting!r}; only 'sharegpt' can be trained on here. "
            "Convert its file to messages and set `formatting: sharegpt`."
        )
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"Entry {entry.name!r}: {path.name} is neither .json nor .jsonl. Convert the file to JSON.")
    if entry.num_samples is not None:
        raise DataError(
            f"Entry {entry.name!r} sets `num_samples`, which draws rows at random. Remove it and use `max_samples` in "
            "the recipe."
        )
    yield from read_json_rows(path)


def _parse_row(value: Any, index: int, entry: Entry, path: Path, data_dir: Path) -> Row:
    place = f"{path}, row {index}"
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object, got {type(value).__name__}. Correct the row.")
    row_id = value["id"] if isinstance(value.get("id"), str) else f"{entry.name}[{index}]"
    place = f"{place} ({row_id})" if isinstance(value.get("id"), str) else place
    messages = _parse_messages(value, entry, place)
    images = _parse_images(value, entry, place, data_dir)
    num_placeholders = sum(m.content.count(IMAGE_PLACEHOLDER) for m in messages if m.role != SYSTEM)
    if num_placeholders != len(images):
        raise DataError(
            f"{place}: {num_placeholders} {IMAGE_PLACEHOLDER} placeholders, but {len(images)} images. Write one "
            f"{IMAGE_PLACEHOLDER} into the user message for each image."
        )
    label = value.get("label")
    return Row(row_id, messages, images, label if isinstance(label, str) else None)


def _parse_messages(value: Mapping[str, Any], entry: Entry, place: str) -> tuple[Message, ...]:
    column = entry.columns.get("messages", "conversations")
    turns = value.get(column)
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{place}: {column!r} should be a list of messages. Correct the row, or `columns` of {entry.name!r}."
        )
    tags = entry.tags
    roles = {tags.get("user_tag", "human"): USER, tags.get("assistant_tag", "gpt"): ASSISTANT}
    system_tag = tags.get("system_tag")
    messages: list[Message] = []
    system_column = entry.columns.get("system")
    if system_column is not None and value.get(system_column):
        messages.append(Message(SYSTEM, _text(value[system_column], f"{place}, {system_column!r}")))
    role_tag, content_tag = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or role_tag not in turn or content_tag not in turn:
            raise DataError(
                f"{place}, message {number}: expected an object with {role_tag!r} and {content_tag!r}. Correct the "
                f"message, or `tags` of {entry.name!r}."
            )
        content = _text(turn[content_tag], f"{place}, message {number}")
        if number == 0 and system_tag is not None and turn[role_tag] == system_tag:
            # as in LLaMA-Factory, a system message in the list wins over the system column
            messages = [Message(SYSTEM, content)]
            continue
        num_turns = sum(message.role != SYSTEM for message in messages)
        expected = (USER, ASSISTANT)[num_turns % 2]
        role = turn[role_tag]
        if not isinstance(role, str) or roles.get(role) != expected:
            tag = next(tag for tag, name in roles.items() if name == expected)
            raise DataError(
                f"{place}, message {number}: expected the role {tag!r}, got {role!r}. User and assistant must take "
                "turns, the user first."
            )
        messages.append(Message(expected, content))
    if not messages or messages[-1].role != ASSISTANT:
        raise DataError(
            f"{place}: the last message is not the assistant's, so there is nothing to learn. Add the answer."
        )
    return tuple(messages)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: expected a text, got {type(value).__name__}. Correct the row.")
    if (where := lone_surrogate(value)) is not None:
        raise DataError(
            f"{place}: the text holds half of a character (a lone surrogate) at position {where}. Write the text again "
            "from where it came, or take the half out."
        )
    return value


def _parse_images(value: Mapping[str, Any], entry: Entry, place: str, data_dir: Path) -> tuple[Path, ...]:
    column = entry.columns.get("images")
    names = [] if column is None else value.get(column) or []
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{place}: {column!r} should be a list of paths. Correct the row.")
    images = []
    for name in names:
        path = path_inside(data_dir, name, what=place)
        if not path.is_file():
            raise DataError(f"{place}: there is no image {path}. Paths are relative to {data_dir}; add the file.")
        images.append(path)
    return tuple(images)
