"""Read ShareGPT files as LLaMA-Factory does, but refuse at once, by row, what it drops or trips over while training."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import digest_json, path_inside, sha256_file
from mllm_assets.data.dataset_info import Entry, entry_file, load_entry
from mllm_assets.data.json_text import lone_surrogate
from mllm_assets.data.row_files import FileRow, file_rows
from mllm_assets.data.tokens import IMAGE_PLACEHOLDER
from mllm_assets.errors import DataError

USER = "user"
ASSISTANT = "assistant"
SYSTEM = "system"
FORMATTINGS = ("sharegpt", "openai", "alpaca")
# columns of LLaMA-Factory whose content cannot be trained on here
UNSUPPORTED_COLUMNS = ("tools", "videos", "audios", "kto_tag")
_OWN_TAGS = {
    "role_tag": "role", "content_tag": "content", "user_tag": USER, "assistant_tag": ASSISTANT, "system_tag": SYSTEM
}  # fmt: skip


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
    for problem in entry_problems(entry):
        raise DataError(problem)
    rows = []
    for row, problems in islice(parse_rows(data_dir, entry), max_samples):
        for problem in problems:
            raise DataError(problem)
        assert row is not None  # no problem
        rows.append(row)
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
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return digest_json([block, *map(sha256_file, files), digests])[:16]


def parse_rows(data_dir: Path, entry: Entry) -> Iterator[tuple[Row | None, list[str]]]:
    """Each row of an entry's file, or all that is wrong with it.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    for index, row in enumerate(file_rows(entry_file(data_dir, entry))):
        problems = [] if row.problem is None else [row.problem]
        yield None if problems else _parse_row(row, index, entry, data_dir, problems), problems


def entry_problems(entry: Entry) -> list[str]:
    """Why an entry cannot be trained on, whatever its rows are."""
    name = f"Entry {entry.name!r}"
    problems = []
    if entry.remote is not None:
        problems.append(
            f"{name} sets `{entry.remote}`, but datasets are read from local files here. Declare the source as a "
            "dataset component, or download it and name its file in `file_name`."
        )
    if entry.formatting not in FORMATTINGS:
        problems.append(
            f"{name} has the formatting {entry.formatting!r}; expected one of {', '.join(FORMATTINGS)}. Correct it."
        )
    if entry.ranking:
        problems.append(f"{name} sets `ranking`, which is for preference training. Use a dataset for `stage: sft`.")
    if entry.split != "train":
        problems.append(
            f"{name} sets `split` to {entry.split!r}, expected 'train', the only split that a file has. Remove it, "
            "and put the rows into a file of their own."
        )
    if entry.num_samples is not None:
        problems.append(
            f"{name} sets `num_samples`, which draws rows at random. Remove it and use `max_samples` in the recipe."
        )
    return problems


def turns_of(value: Mapping[str, Any], entry: Entry) -> tuple[Any, Mapping[str, str]]:
    """A row's list of turns, and the tags that it is written with."""
    if entry.formatting != "alpaca":
        return value.get(entry.columns.get("messages", "conversations")), entry.tags
    history = value.get(entry.columns.get("history", "")) or []
    pairs = [pair for pair in history if isinstance(pair, list | tuple) and len(pair) == 2]
    question = [value.get(entry.columns.get(column, "")) for column in ("prompt", "query")]
    pairs.append(("\n".join(str(text) for text in question if text), value.get(entry.columns.get("response", ""))))
    roles = (USER, ASSISTANT)
    return [
        {"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)
    ], _OWN_TAGS


def _parse_row(row: FileRow, index: int, entry: Entry, data_dir: Path, problems: list[str]) -> Row | None:
    value, place = row.value, row.place
    if not isinstance(value, dict):
        problems.append(f"{place}: expected an object, got {type(value).__name__}. Correct the row.")
        return None
    row_id = value["id"] if isinstance(value.get("id"), str) else f"{entry.name}[{index}]"
    place = f"{place} ({row_id})" if isinstance(value.get("id"), str) else place
    for column in UNSUPPORTED_COLUMNS:
        if entry.columns.get(column) and value.get(entry.columns[column]):
            problems.append(f"{place}: {column!r} cannot be trained on here. Remove it, or take the row out.")
    messages = _parse_messages(value, entry, place, problems)
    images = _parse_images(value, entry, place, data_dir, problems)
    if problems:
        return None
    num_placeholders = sum(m.content.count(IMAGE_PLACEHOLDER) for m in messages if m.role != SYSTEM)
    if num_placeholders != len(images):
        problems.append(
            f"{place}: {num_placeholders} {IMAGE_PLACEHOLDER} placeholders, but {len(images)} images. Write one "
            f"{IMAGE_PLACEHOLDER} into the user message for each image."
        )
    label = value.get("label")
    return Row(row_id, messages, images, label if isinstance(label, str) else None)


def _parse_messages(value: Mapping[str, Any], entry: Entry, place: str, problems: list[str]) -> tuple[Message, ...]:
    turns, tags = turns_of(value, entry)
    if not isinstance(turns, list) or not turns:
        column = entry.columns.get("messages", "conversations")
        problems.append(
            f"{place}: {column!r} should be a list of messages. Correct the row, or `columns` of {entry.name!r}."
        )
        return ()
    roles = {tags.get("user_tag", "human"): USER, tags.get("assistant_tag", "gpt"): ASSISTANT}
    system_tag = tags.get("system_tag")
    messages: list[Message] = []
    system_column = entry.columns.get("system")
    if system_column is not None and value.get(system_column):
        messages.append(Message(SYSTEM, _text(value[system_column], f"{place}, {system_column!r}", problems)))
    role_tag, content_tag = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    for number, turn in enumerate(turns):
        where = f"{place}, message {number}"
        if not isinstance(turn, dict) or role_tag not in turn or content_tag not in turn:
            problems.append(
                f"{where}: expected an object with {role_tag!r} and {content_tag!r}. Correct the message, or `tags` "
                f"of {entry.name!r}."
            )
            return ()
        content = _text(turn[content_tag], where, problems)
        if number == 0 and system_tag is not None and turn[role_tag] == system_tag:
            # as in LLaMA-Factory, a system message in the list wins over the system column
            messages = [Message(SYSTEM, content)]
            continue
        num_turns = sum(message.role != SYSTEM for message in messages)
        expected = (USER, ASSISTANT)[num_turns % 2]
        role = turn[role_tag]
        if not isinstance(role, str) or roles.get(role) != expected:
            tag = next(tag for tag, name in roles.items() if name == expected)
            problems.append(
                f"{where}: expected the role {tag!r}, got {role!r}. User and assistant must take turns, the user first."
            )
            return ()
        messages.append(Message(expected, content))
    if not messages or messages[-1].role != ASSISTANT:
        problems.append(
            f"{place}: the last message is not the assistant's, so there is nothing to learn. Add the answer."
        )
    return tuple(messages)


def _text(value: Any, place: str, problems: list[str]) -> str:
    if not isinstance(value, str):
        problems.append(f"{place}: expected a text, got {type(value).__name__}. Correct the row.")
        return ""
    if (where := lone_surrogate(value)) is not None:
        problems.append(
            f"{place}: the text holds half of a character (a lone surrogate) at position {where}. Write the text again "
            "from where it came, or take the half out."
        )
    return value


def _parse_images(
    value: Mapping[str, Any], entry: Entry, place: str, data_dir: Path, problems: list[str]
) -> tuple[Path, ...]:
    column = entry.columns.get("images")
    names = [] if column is None else value.get(column) or []
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.append(f"{place}: {column!r} should be a list of paths. Correct the row.")
        return ()
    images = []
    for name in names:
        try:
            path = path_inside(data_dir, name, what=place)
        except DataError as error:
            problems.append(str(error))
            continue
        if not path.is_file():
            problems.append(f"{place}: there is no image {path}. Paths are relative to {data_dir}; add the file.")
        images.append(path)
    return tuple(images)
