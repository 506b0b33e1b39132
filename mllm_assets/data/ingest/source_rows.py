"""The rows that every source yields, and how the named values of any table, tar or folder become them."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER, answers_of, as_conversation
from mllm_assets.data.sharegpt.pictures import MediaFolders, Pictures, listed_in_text, read_pictures
from mllm_assets.errors import DataError, did_you_mean

Images = tuple[bytes | None, ...]
# the columns that name a row's image or images where `image_column` is not there, as `datasets` knows them
FILE_COLUMNS = ("file_name", "file_names", "images_file_names", "image_file_name")
QUESTION, SYSTEM, HISTORY, CHOICES = "question", "system", "history", "choices"
FIRST_LETTER = ord("A")
_NUMBERED_IMAGE = re.compile(r"<image[ _]\d+>")
# of an object that is one of several answers, as VQA and VizWiz have them: its text
ANSWER_KEYS = ("answer", "caption", "text", "raw", "sentence", "value")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """One sample of a source: undecoded images (None where one is missing) and its texts.

    `row_index` is the row's position in the source, `location` its readable form (see `row_files.location_of`);
    `messages` is a conversation as JSON (see `conversation`), where the source has one; `source_split` is "train",
    "val" or "test" where the source is split already; `defect` is the reject reason of a row that the source cannot
    fully give, and `detail` the value or path that it is about; `source_id` is the source's own id of the row, and
    `fields` are the texts of further columns by name. `files` are those of its pictures, where they are files of their
    own.
    """

    row_index: int
    location: str
    images: Images = ()
    caption: str | None = None
    label: str | None = None
    messages: str | None = None
    source_split: str | None = None
    defect: str | None = None
    detail: str | None = None
    source_id: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


def needed_columns(source: SourceSpec, schema: pa.Schema, where: str) -> list[str]:
    """The columns of a table that a spec needs.

    Raises:
        DataError: One is missing; names the nearest one and all that exist.
    """
    require_named(source, schema.names, where)
    wanted = [source.image_column, *_text_columns(source), source.id_column or "id", *FILE_COLUMNS]
    return [name for name in dict.fromkeys(wanted) if name in schema.names]


def _text_columns(source: SourceSpec) -> list[str]:
    # a caption next to conversations is not read, so the default name need not exist
    texts = source.messages_columns or (source.caption_column, source.question_column)
    columns = (
        *texts,
        source.label_column,
        *source.choices_columns,
        source.system_column,
        source.history_column,
        *source.text_columns,
    )
    return [name for name in columns if name is not None]


def require_named(source: SourceSpec, found: Collection[str], where: str) -> None:
    """Refuse a file if it, or none of its rows, has a column that the spec names.

    Images may be named in other ways, or be in the conversation.

    Raises:
        DataError: As `needed_columns`.
    """
    columns = [*_text_columns(source), *([source.id_column] if source.id_column else [])]
    if source.image_column != "image" or not (source.messages_columns or {*FILE_COLUMNS} & {*found}):
        columns = [source.image_column, *columns]
    for column in columns:
        if column not in found:
            raise DataError(
                f"{where} has no column {column!r}; its columns are {', '.join(found)}. "
                f"{did_you_mean(column, found)}Correct image_column, caption_column, question_column, label_column, "
                "messages_column or the {names} of prompts and answer in the dataset's YAML."
            )


def class_names(schema: pa.Schema | None) -> dict[str, Sequence[str]]:
    """Names of Hugging Face ClassLabel columns, from the metadata that `datasets` writes, by column."""
    raw = (schema.metadata or {}).get(b"huggingface") if schema is not None else None
    if raw is None:
        return {}
    try:
        features = json.loads(raw)["info"]["features"]
        named = {name: item["names"] for name, item in features.items() if item.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # written by something else
        return {}
    return {
        column: names
        for column, names in named.items()
        if isinstance(names, list) and all(isinstance(name, str) for name in names)
    }


@dataclass(frozen=True, slots=True)
class RowReader:
    """Makes the rows of a source out of named values; a value of a wrong type is a defect of its row alone.

    Attributes:
        source: Names the columns.
        media: Where pictures that are named by a path are.
        names: The class names of columns that hold a class's number.
    """

    source: SourceSpec
    media: MediaFolders
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def read(self, values: Mapping[str, Any], row: SourceRow, pictures: Pictures | None = None) -> Iterator[SourceRow]:
        """The rows of one row of the source: several where it has a list of captions and the spec wants them all.

        They are numbered from the index of `row` on.

        Args:
            values: The columns that the row has.
            row: Its index, location and side.
            pictures: Its pictures, where they are not in its columns.
        """
        source = self.source
        row_id = values.get(source.id_column or "id")
        is_id = isinstance(row_id, str | int) and not isinstance(row_id, bool)
        if pictures is None:
            pictures = read_pictures(self.picture_cell(values), self.media)
        asks_itself = source.messages_columns or source.question_column or source.text_columns
        if not pictures.images and not asks_itself:
            pictures = Pictures((None,), "image_missing", f"column {source.image_column!r} is empty")
        texts = _Texts(self)
        label, fields, messages = texts.one(values, source.label_column), texts.fields(values), row.messages
        if source.messages_columns:
            talk = as_conversation(put_together([values.get(name) for name in source.messages_columns]))
            pictures += read_pictures(list(talk.pictures) or None, self.media)
            messages = talk.messages
            captions: list[str | None] = [encodable(answers_of(messages))]
        else:
            captions = texts.several(values, source.caption_column)
            if source.choices_columns:
                captions = [texts.choice(values, captions[0])]
        defect = row.defect or pictures.defect or texts.defect
        detail = row.detail if row.defect else pictures.looked_for if pictures.defect else texts.detail
        for number, caption in enumerate(captions):  # made at once: `replace` takes longer than reading a short row
            yield SourceRow(
                row_index=row.row_index + number,
                location=row.location,
                images=pictures.images,
                caption=caption,
                label=label,
                messages=messages,
                source_split=row.source_split,
                defect=defect,
                detail=encodable(detail) if detail else None,
                source_id=encodable(str(row_id)) if is_id else row.source_id,
                fields=fields,
                files=pictures.files,
            )

    def picture_cell(self, values: Mapping[str, Any]) -> Any:
        """The value that holds or names a row's pictures, or None."""
        for name in (self.source.image_column, *FILE_COLUMNS):
            value = values.get(name)
            if value is not None:  # an id's file has its name and a suffix
                return str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        return None


class _Texts:
    """The texts of one row, and what is wrong with the first that is none."""

    def __init__(self, reader: RowReader) -> None:
        self._source, self._names = reader.source, reader.names
        self.defect: str | None = None
        self.detail: str | None = None

    def fields(self, values: Mapping[str, Any]) -> dict[str, str]:
        columns = {name: name for name in self._source.text_columns}
        columns |= {QUESTION: self._source.question_column} if self._source.question_column else {}
        columns |= {SYSTEM: self._source.system_column} if self._source.system_column else {}
        found = {name: self.one(values, column) for name, column in columns.items()}
        if (question := found.get(QUESTION)) is not None:  # where several images are in it, as MMMU has them
            found[QUESTION] = _NUMBERED_IMAGE.sub(IMAGE_PLACEHOLDER, question)
        if options := self.options(values):
            found[CHOICES] = "\n".join(f"{chr(FIRST_LETTER + n)}. {option}" for n, option in enumerate(options))
        if (column := self._source.history_column) and values.get(column):
            found[HISTORY] = json.dumps(values[column], default=repr)
        return {name: text for name, text in found.items() if text is not None}

    def one(self, values: Mapping[str, Any], column: str | None) -> str | None:
        """The one text of a column, the first where it has several."""
        return self.several(values, column)[0]

    def several(self, values: Mapping[str, Any], column: str | None) -> list[str | None]:
        """All texts of a column, at least one, which may be None."""
        value = None if column is None else values.get(column)
        assert column is not None or value is None
        if value is None:
            return [None]
        if isinstance(value, str):
            listed = listed_in_text(value)
            if not listed or not all(isinstance(text, str) for text in listed):
                return [encodable(value)]
            value = listed
        items = value if isinstance(value, list) else [value]
        texts = [self._text(item, column or "") for item in items]
        counted = Counter(text for text in texts if text is not None)  # in their order
        different: list[str | None] = list(counted) or [None]
        if self._source.several == "most" and counted:
            return [counted.most_common(1)[0][0]]
        return different if self._source.several == "rows" else different[:1]

    def options(self, values: Mapping[str, Any]) -> list[str]:
        """The texts of a row's choices; a row may have fewer than there are columns."""
        columns = self._source.choices_columns
        if len(columns) == 1:
            return _options(values.get(columns[0]))
        cells = [self.one(values, column) or "" for column in columns]
        while cells and not cells[-1]:
            cells.pop()
        return cells

    def choice(self, values: Mapping[str, Any], answer: str | None) -> str | None:
        """The text of the choice that an answer names by its number or letter."""
        options = self.options(values)
        name = (answer or "").strip(" ().:")
        number = int(name) if name.isdecimal() else ord(name.upper()) - FIRST_LETTER if len(name) == 1 else None
        if answer in options or (number is not None and 0 <= number < len(options)):
            return answer if answer in options or number is None else options[number]
        self.defect = self.defect or "choice_unreadable"
        self.detail = self.detail or f"{answer!r:.80} is none of {len(options)} choices"
        return None

    def _text(self, value: Any, column: str) -> str | None:
        if isinstance(value, Mapping):
            value = next((value[key] for key in ANSWER_KEYS if isinstance(value.get(key), str)), value)
        if value is None or isinstance(value, str):
            return None if value is None else encodable(value)
        names = self._names.get(column)
        if isinstance(value, int) and not isinstance(value, bool) and names is not None:
            # datasets writes -1 where a row has no label
            return names[value] if 0 <= value < len(names) else None
        if isinstance(value, bool | int | float):
            return json.dumps(value)
        if self.defect is None:
            kind = "label" if column == self._source.label_column else "caption"
            self.defect, self.detail = f"{kind}_unreadable", f"column {column!r}: a {type(value).__name__}, not a text"
        return None


def _options(value: Any) -> list[str]:
    """The texts of choices: a list, or its text."""
    items = listed_in_text(value) if isinstance(value, str) else value
    return [encodable(str(item)) for item in items] if isinstance(items, list) else []


def with_conversation(row: SourceRow, messages: str) -> SourceRow:
    """A row with a conversation; its answers become the caption, from which statistics are computed."""
    return replace(row, caption=encodable(answers_of(messages)), messages=messages)


def put_together(cells: list[Any]) -> Any:
    """One conversation out of several columns: turns in order, and texts as a question and its answer."""
    if len(cells) == 1:
        return cells[0]
    turns: list[Any] = []
    for number, cell in enumerate(cells):
        if isinstance(cell, list):
            turns += cell
        elif cell is not None:
            turns.append({"role": "assistant" if number else "user", "content": cell})
    return turns


def encodable(text: str) -> str:
    """Replace lone surrogates of JSON and file names with U+FFFD, which `conversation.text_defect` reports."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
