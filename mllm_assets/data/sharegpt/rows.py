"""Read ShareGPT files as LLaMA-Factory does, but refuse at once, by row, what it drops or fails on while training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_assets.data.sharegpt.conversation import (
    ANSWERING,
    ASKING,
    ASSISTANT,
    IMAGE_PLACEHOLDER,
    SYSTEM,
    USER,
    VIDEO_PLACEHOLDER,
    content_text,
)
from mllm_assets.data.sharegpt.entries import COLUMNS, DEFAULT_TAGS, ENTRY_KEYS, EntryInfo, entry_file
from mllm_assets.data.sharegpt.json_text import lone_surrogate
from mllm_assets.data.sharegpt.media import Pictured, images_of, videos_of
from mllm_assets.data.sharegpt.row_files import FileRow, file_rows
from mllm_assets.data.sharegpt.tool_turns import called, roles_by_tag, tools_of, with_joined_observations
from mllm_assets.errors import DataError, all_of, did_you_mean, nearest

OPENAI = "openai"  # where calls are in `tool_calls`, and each of their results is a message
FORMATTINGS = ("sharegpt", OPENAI, "alpaca")
# columns of LLaMA-Factory whose content cannot be trained on here
UNSUPPORTED_COLUMNS = ("audios",)
# columns that may be missing in a row, and so are missing without a word in all where their name is wrong
_QUIET_COLUMNS = ("system", "history", "tools", "videos", *UNSUPPORTED_COLUMNS)
MARKED_BAD = "answer_marked_bad"  # what only `stage: kto` learns from
PAIR = ("chosen", "rejected")  # columns of a pair's answers
IMAGE_NAMES = ("images", "image")  # columns that hold images whatever an entry says
_OWN_TAGS = {
    "role_tag": "role", "content_tag": "content", "user_tag": USER, "assistant_tag": ASSISTANT, "system_tag": SYSTEM
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `role` is of `conversation` ("system", "user", "assistant", ...) whatever the file's tags are.

    The content of a "function" is JSON of the calls, as in the file.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One sample: at most one leading system message, then user and assistant in turn; absolute image paths.

    An observation may be in the user's place, but not first, and a function in the assistant's.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[Path, ...]
    label: str | None = None
    rejected: Message | None = None  # of a pair, whose last message is the preferred answer
    mark: bool | None = None  # whether the last answer is a good one, where the entry says so
    tools: str = ""  # JSON of what the model may call
    videos: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class RowProblem:
    """What is wrong with a row: a dataset's reject reason, and the text for who reads the file itself."""

    reason: str
    text: str


def rows_of_entry(data_dir: Path, entry: EntryInfo, *, with_pairs: bool = False) -> Iterator[FileRow]:
    """The rows of an entry's file; of pairs only where the reader knows both answers.

    Raises:
        DataError: The entry or its file cannot be used, or, after the last row, a column that it names is in none.
    """
    if problems := entry_problems(entry, with_pairs=with_pairs):
        raise DataError(all_of(f"{data_dir}: {problem}" for problem in problems))
    unseen = {entry.columns[column]: column for column in _QUIET_COLUMNS if column in entry.columns}
    unread = () if "images" in entry.columns else [name for name in IMAGE_NAMES if name not in entry.columns.values()]
    row = None
    for row in file_rows(entry_file(data_dir, entry)):
        if name := next((n for n in unread if isinstance(row.value, dict) and row.value.get(n)), None):
            raise DataError(
                f"{row.place}: the row has {name!r}, but entry {entry.name!r} reads no images, so that it would be "
                f'learnt without them. Add "images": "{name}" to its `columns`, or take {name!r} out of the rows.'
            )
        yield row
        if unseen and isinstance(row.value, dict):
            unseen = {name: column for name, column in unseen.items() if name not in row.value}
    if row is not None:
        for name, column in unseen.items():
            raise DataError(
                f"Entry {entry.name!r} reads {column!r} from the column {name!r}, which no row has. Correct `columns`, "
                "or remove the line."
            )


def entry_problems(entry: EntryInfo, *, with_pairs: bool = False) -> list[str]:
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
    pair = [column for column in PAIR if column in entry.columns]
    if entry.ranking and not with_pairs:
        problems.append(f"{name} sets `ranking`, which is for preference training. Use a dataset for `stage: sft`.")
    elif entry.ranking and len(pair) < 2:
        problems.append(
            f'{name} sets `ranking`, and `columns` does not name both answers. Add "chosen" and "rejected" to it.'
        )
    if pair and not entry.ranking:
        problems.append(
            f"{name} has the columns {' and '.join(pair)}, which are for preference training. Remove them from "
            "`columns` if another column holds the one answer to learn, or set `ranking` for a recipe of stage: dpo."
        )
    for block, found, known in (("columns", entry.columns, COLUMNS), ("tags", entry.tags, DEFAULT_TAGS)):
        problems += [
            f"{name}: `{block}` has no {key!r}, so that what it means would be skipped. {did_you_mean(key, known)}"
            f"It has: {', '.join(known)}."
            for key in found
            if key not in known
        ]
    problems += [
        f"{name}: {key!r} is read by nothing. Did you mean {near!r}?"
        for key in entry.unknown_keys
        for near in nearest(key, ENTRY_KEYS)
    ]
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


def turns_of(value: Mapping[str, Any], entry: EntryInfo) -> tuple[Any, Mapping[str, str]]:
    """A row's list of turns, and their tags."""
    if entry.formatting != "alpaca":
        return value.get(entry.columns.get("messages", "conversations")), entry.tags
    pairs = value.get(entry.columns.get("history", "")) or []
    question = [text for column in ("prompt", "query") if (text := value.get(entry.columns.get(column, "")))]
    asked = "\n".join(question) if all(isinstance(text, str) for text in question) else question
    pairs = [*(pairs if isinstance(pairs, list) else [pairs]), (asked, value.get(entry.columns.get("response", "")))]
    turns: list[Any] = []
    for pair in pairs:
        whole = isinstance(pair, list | tuple) and len(pair) == 2
        turns += [{"role": USER, "content": pair[0]}, {"role": ASSISTANT, "content": pair[1]}] if whole else [pair]
    return turns, _OWN_TAGS


def read_messages(
    value: Mapping[str, Any], entry: EntryInfo, place: str
) -> tuple[tuple[Message, ...], tuple[Any, ...], list[RowProblem]]:
    """A row's messages, as everything reads them that trains on or takes in LLaMA-Factory's format.

    Args:
        value: The row.
        entry: Names its columns and tags.
        place: Where it is, for the problems.

    Returns:
        The messages up to the first that cannot be read, the pictures that are in their parts, and what is wrong.
    """
    problems = list(_column_problems(value, entry, place))
    pictures: list[Any] = []
    turns, tags = turns_of(value, entry)
    if not isinstance(turns, list) or not turns:
        column = entry.columns.get("messages", "conversations")
        text = f"{place}: {column!r} should be a list of messages. Correct the row, or `columns` of {entry.name!r}."
        return (), (), [*problems, RowProblem("messages_unreadable", text)]
    messages: list[Message] = []
    system_column = entry.columns.get("system")
    role_tag, content_tag, system_tag = tags.get("role_tag"), tags.get("content_tag"), tags.get("system_tag")
    opens = isinstance(turns[0], dict) and content_tag in turns[0] and turns[0].get(role_tag) == system_tag is not None
    if opens:  # as in LLaMA-Factory, a system message in the list wins over the system column
        messages.append(Message(SYSTEM, _text(turns[0][content_tag], f"{place}, message 0", problems, pictures)))
    elif system_column is not None and value.get(system_column):
        messages.append(Message(SYSTEM, _text(value[system_column], f"{place}, {system_column!r}", problems, pictures)))
    spoken = list(enumerate(turns))[opens:]
    if entry.formatting == OPENAI:
        spoken = with_joined_observations([(number, called(turn, tags)) for number, turn in spoken], tags)
    for at, (number, turn) in enumerate(spoken):
        expected = ANSWERING if at % 2 else ASKING if at else (USER,)
        role = _role_of(expected, turn, tags, entry, f"{place}, message {number}", problems)
        if role is None:
            return (), (), problems
        content = turn[tags.get("content_tag", "value")]
        messages.append(Message(role, _text(content, f"{place}, message {number}", problems, pictures)))
    if not messages or messages[-1].role not in ANSWERING:
        text = f"{place}: the last message is not the assistant's, so there is nothing to learn. Add the answer."
        problems.append(RowProblem("messages_role_order", text))
    return tuple(messages), tuple(pictures), problems


def _column_problems(value: Mapping[str, Any], entry: EntryInfo, place: str) -> Iterator[RowProblem]:
    """What columns next to the messages make of the row."""
    for column in UNSUPPORTED_COLUMNS:
        found = value.get(entry.columns[column]) if column in entry.columns else None
        if found and found != "[]":
            text = f"{place}: {column!r} cannot be trained on here. Remove it, or take the row out."
            yield RowProblem(f"{column}_unsupported", text)
    if (column := entry.columns.get("kto_tag")) is None:
        return
    if (mark := value.get(column)) is False:
        text = f"{place}: {column!r} is false: the answer is marked as a bad one. Take the row out, or it is learnt."
        yield RowProblem(MARKED_BAD, text)
    elif mark is not True:
        text = f"{place}: {column!r} should be true or false, got {mark!r:.40}. Mark the row, or take it out."
        yield RowProblem("answer_mark_unreadable", text)


def _role_of(
    expected: Sequence[str],
    turn: Any,
    tags: Mapping[str, str],
    entry: EntryInfo,
    where: str,
    problems: list[RowProblem],
) -> str | None:
    """The role of a turn that has a content and one of those expected; if not, nothing after it can be understood."""
    role_tag, content_tag = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    if not isinstance(turn, dict) or role_tag not in turn or content_tag not in turn:
        cure = f"an object with {role_tag!r} and {content_tag!r}. Correct the message, or `tags` of {entry.name!r}."
        if entry.formatting == "alpaca":
            cure = "a question and its answer, two texts in a list. Correct the history."
        problems.append(RowProblem("messages_unreadable", f"{where}: expected {cure}"))
        return None
    if turn.get("tool_calls"):
        text = f"{where}: 'tool_calls' are read of entries with `formatting` openai only. Set it, or take the row out."
        problems.append(RowProblem("tools_unsupported", text))
    roles = roles_by_tag(tags)
    if (role := roles.get(turn[role_tag])) in expected:
        return role
    known = " or ".join(repr(tag) for tag, role in roles.items() if role in expected)
    order = "User and assistant must take turns, the user first."
    text = f"{where}: expected the role {known}, got {turn[role_tag]!r}. {order}"
    problems.append(RowProblem("messages_role_order", text))
    return None


def parse_row(row: FileRow, index: int, entry: EntryInfo, folder: Pictured, problems: list[str]) -> Row | None:
    """A row, or None and what is wrong with it in `problems`."""
    value, place = row.value, row.place
    if not isinstance(value, dict):
        problems.append(f"{place}: expected an object, got {type(value).__name__}. Correct the row.")
        return None
    row_id = value["id"] if isinstance(value.get("id"), str) else f"{entry.name}[{index}]"
    place = f"{place} ({row_id})" if isinstance(value.get("id"), str) else place
    rejected, found = None, []
    if entry.ranking:
        rejected = _rejected(value, entry, place, found)
        value, entry = _with_chosen(value, entry)
    messages, in_parts, others = read_messages(value, entry, place)
    problems += [problem.text for problem in (*found, *others) if problem.reason != MARKED_BAD]
    images = images_of(value, in_parts, entry, place, folder, problems)
    videos = videos_of(value, entry, place, folder, problems)
    if problems:
        return None
    for placeholder, files, what in ((IMAGE_PLACEHOLDER, images, "image"), (VIDEO_PLACEHOLDER, videos, "video")):
        messages = _placed(messages, placeholder, len(files), what, place, problems)
    label, tools = value.get("label"), tools_of(value.get(entry.columns["tools"]) if "tools" in entry.columns else None)
    if tools is None:
        problems.append(f"{place}: {entry.columns['tools']!r} should be a list of tools as JSON. Correct the row.")
    mark = value.get(entry.columns["kto_tag"]) if "kto_tag" in entry.columns else None
    return Row(row_id, messages, images, label if isinstance(label, str) else None, rejected, mark, tools or "", videos)


def _with_chosen(value: Mapping[str, Any], entry: EntryInfo) -> tuple[Mapping[str, Any], EntryInfo]:
    """A pair as a row of its preferred answer."""
    if entry.formatting == "alpaca":
        return value, replace(entry, columns={**entry.columns, "response": entry.columns["chosen"]})
    column = entry.columns.get("messages", "conversations")
    turns = value.get(column)
    return {**value, column: [*turns, value.get(entry.columns["chosen"])] if isinstance(turns, list) else turns}, entry


def _rejected(value: Mapping[str, Any], entry: EntryInfo, place: str, problems: list[RowProblem]) -> Message | None:
    """The other answer of a pair."""
    column = entry.columns["rejected"]
    turn: Any = value.get(column)
    tags, where = entry.tags, f"{place}, {column!r}"
    if entry.formatting == "alpaca":
        turn, tags = {"role": ASSISTANT, "content": turn}, _OWN_TAGS
    turn = called(turn, tags) if entry.formatting == OPENAI else turn
    role = _role_of(ANSWERING, turn, tags, entry, where, problems)
    if role is None:
        return None
    pictures: list[Any] = []
    text = _text(turn[tags.get("content_tag", "value")], where, problems, pictures)
    if pictures or IMAGE_PLACEHOLDER in text:
        problem = f"{where}: an answer cannot show a picture. Take it out, or move it into the question."
        problems.append(RowProblem("messages_unreadable", problem))
    return Message(role, text)


def _placed(
    messages: tuple[Message, ...], placeholder: str, count: int, what: str, place: str, problems: list[str]
) -> tuple[Message, ...]:
    """The messages with a placeholder for each picture or video: before the first question where there is none."""
    misplaced = [(i, m.role) for i, m in enumerate(messages) if m.role not in ASKING and placeholder in m.content]
    problems += [
        f"{place}, message {number}: the {role}'s text holds {placeholder}, and only a user's message can show a "
        f"{'picture' if what == 'image' else what}: as an answer it would be learnt. Take it out, or move it into the "
        "question."
        for number, role in misplaced
    ]
    num_placeholders = sum(m.content.count(placeholder) for m in messages if m.role in ASKING)
    if misplaced or num_placeholders == count:
        return messages
    if num_placeholders:
        problems.append(
            f"{place}: {num_placeholders} {placeholder} placeholders, but {count} {what}s. Write one {placeholder} "
            f"into the user message for each {what}."
        )
        return messages
    first = next(number for number, message in enumerate(messages) if message.role == USER)  # LLaMA-Factory fails here
    shown = Message(USER, placeholder * count + messages[first].content)
    return (*messages[:first], shown, *messages[first + 1 :])


def _text(value: Any, place: str, problems: list[RowProblem], pictures: list[Any]) -> str:
    value = content_text(value, pictures)
    if not isinstance(value, str):
        text = f"{place}: expected a text, got {type(value).__name__}. Correct the row."
        problems.append(RowProblem("messages_unreadable", text))
        return ""
    if (where := lone_surrogate(value)) is not None:
        text = (
            f"{place}: the text holds half of a character (a lone surrogate) at position {where}. Write the text again "
            "from where it came, or take the half out."
        )
        problems.append(RowProblem("messages_undecodable", text))
    return value
