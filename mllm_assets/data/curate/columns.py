"""Which column of a table holds what, by its name and by what is in it; what several readings fit is asked for."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from mllm_assets.data.curate.cells import is_list_text, is_picture
from mllm_assets.data.ingest.source_rows import FILE_COLUMNS, put_together
from mllm_assets.data.sharegpt.conversation import as_conversation, conversation_defect
from mllm_assets.data.sharegpt.pictures import MediaFolders
from mllm_assets.errors import DataError

# names in use, the likeliest first
IMAGES = (
    "image", "images", "img", "imgs", "picture", "photo", "image_path", "img_path", "image_file", "image_name",
    "filename", "file", "path", "filepath", "image_url", "url", "jpg", "png", "image_bytes", "screenshot", "page_image",
)  # fmt: skip
IMAGE_NUMBERS = ("image_id", "imageid", "img_id")
CAPTIONS = ("text", "caption", "captions", "description", "sentence", "sentences", "raw", "title")
QUESTIONS = ("question", "questions", "query", "problem", "instruction", "user_prompt", "prefix")
ASKING = ("prompt", "user", "human", "input")  # a question only beside an answer
ANSWERS = (
    "multiple_choice_answer", "answer", "answers", "response", "completion", "output", "solution", "full_answer",
    "direct_answers", "correct_choice_idx", "answer_idx", "suffix", "assistant", "gpt", "ground_truth",
)  # fmt: skip
LABELS = ("label", "labels", "class", "class_name", "category", "group", "target", "species", "breed", "fine_label")
CONVERSATIONS = ("messages", "conversations", "conversation", "texts", "dialog", "dialogue", "chat", "turns")
IDS = ("id", "question_id", "sample_id", "uid", "key", "image_id", "idx", "index")
CHOICES = ("choices", "options", "candidates")
CHOICE_PREFIXES = ("", "option_", "choice_", "option ", "choice ", "option", "choice")  # of a column a choice: option_a
MAX_SAMPLED = 200
MAX_CLASSES = 0.5  # different labels to a row: above it a column of short texts is not a class
CAPTION_PROMPTS = ("Describe this image.", "What do you see in this image?", "What is shown here?")
LABEL_PROMPTS = ("What is shown in this image?", "What kind of picture is this?")
FLAGS = {name: f"--{name}" for name in ("image", "question", "answer", "label", "messages")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """Columns that a person named; None where the reader finds them."""

    image: str | None = None
    question: str | None = None
    answer: str | None = None
    label: str | None = None
    messages: str | None = None


class Undecided(DataError):
    """Several readings fit, or none: says which columns there are and the flag that decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """What each column of a source is for; `images` is the column of pictures, "" where conversations hold them."""

    image: str = ""
    question: str | None = None
    caption: str | None = None
    label: str | None = None
    messages: tuple[str, ...] = ()
    system: str | None = None
    history: str | None = None
    id: str | None = None
    prompts: tuple[str, ...] = ()
    answer: str = ""
    several: str | None = None
    choices: str | tuple[str, ...] | None = None

    def source(self) -> dict[str, Any]:
        """Their names in a dataset's YAML."""
        found: dict[str, Any] = {"image_column": self.image} if self.image not in ("", "image", *FILE_COLUMNS) else {}
        if self.messages:
            found["messages_column"] = self.messages[0] if len(self.messages) == 1 else list(self.messages)
        else:
            found |= {"question_column": self.question} if self.question else {}
            found["caption_column"] = self.caption
            found |= {"label_column": self.label} if self.label else {}
            found |= (
                {"choices_column": self.choices if isinstance(self.choices, str) else list(self.choices or ())}
                if self.choices
                else {}
            )
        optional = {"system_column": self.system, "history_column": self.history}
        optional |= {"id_column": self.id if self.id != "id" else None, "several": self.several}
        return found | {name: column for name, column in optional.items() if column}

    def shown(self) -> str:
        """The columns in words."""
        choices = self.choices if isinstance(self.choices, str | None) else ", ".join(self.choices)
        parts = {"images": self.image or "in the conversation", "conversation": " + ".join(self.messages),
                 "question": self.question, "answer": self.caption, "choices": choices, "label": self.label,
                 "system": self.system, "history": self.history, "id": self.id}  # fmt: skip
        return ", ".join(f"{role} {column}" for role, column in parts.items() if column)


def find_roles(rows: Sequence[Mapping[str, Any]], media: MediaFolders, where: str, chosen: Chosen) -> Roles:
    """The roles of the columns of some rows.

    Raises:
        Undecided: Several readings fit, or none; lists the columns and the flags.
    """
    return _Finder(rows[:MAX_SAMPLED], media, where, chosen).roles()


@dataclass(frozen=True, slots=True)
class _Finder:
    rows: Sequence[Mapping[str, Any]]
    media: MediaFolders
    where: str
    chosen: Chosen

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(str(name) for row in self.rows for name in row))

    def values(self, column: str) -> list[Any]:
        return [row[column] for row in self.rows if row.get(column) is not None]

    def roles(self) -> Roles:
        for role in ("image", "question", "answer", "label", "messages"):
            name = getattr(self.chosen, role)
            if name is not None and not set(name.split(",")) <= {*self.columns}:
                raise self.undecided(f"{FLAGS[role]} names {name!r}, which no row has")
        if {"chosen", "rejected"} <= {*self.columns}:
            raise self.undecided("chosen and rejected are answers for preference training, which is not `stage: sft`")
        messages = self.messages()
        image = self.image(bool(messages))
        found = Roles(image=image, id=self.first_unique(IDS), label=self.chosen.label)
        if messages:
            return replace(found, messages=messages, system=self.named(("system",)))
        return self.texts(found)

    def messages(self) -> tuple[str, ...]:
        if self.chosen.messages is not None:
            return tuple(self.chosen.messages.split(","))
        if self.chosen.answer or self.chosen.label:
            return ()
        fit = [column for column in self.columns if self.talks([column])]
        named = [column for column in fit if column.lower() in CONVERSATIONS]
        if not named and self.named(ANSWERS) and self.named(QUESTIONS):  # with a history of earlier ones
            return ()
        if len(named or fit) > 1:
            raise self.undecided(f"{' and '.join(named or fit)} are conversations", "--messages COLUMN")
        if named or fit:
            return tuple(named or fit)
        pair = ("prompt", "completion")
        return pair if {*pair} <= {*self.columns} and self.talks(pair) else ()

    def talks(self, columns: Sequence[str]) -> bool:
        """Whether most rows hold a conversation in these columns."""
        values = [put_together([row.get(column) for column in columns]) for row in self.rows]
        values = [value for value in values if isinstance(value, list | dict) or is_list_text(value)]
        fine = 0
        for value in values:
            talk = as_conversation(value).messages
            defect = conversation_defect(talk, talk.count("<image>"), 10**9)
            fine += defect not in ("messages_unreadable", "messages_role_order")
        return len(values) > 0 and fine * 2 > len(self.rows)

    def image(self, has_messages: bool) -> str:
        if self.chosen.image is not None:
            return self.chosen.image
        shares = {column: self.pictured(column) for column in self.columns}
        fit = [column for column in self.columns if shares[column] > 0]
        by_name = [name for name in (*FILE_COLUMNS, *IMAGES) for column in fit if column.lower() == name]
        exact = [column for name in by_name for column in fit if column.lower() == name]
        # one that has pictures in more rows is the column that is meant: others hold a thumbnail or where it came from
        best = sorted(dict.fromkeys(exact or fit), key=lambda column: -shares[column])
        if best:
            equal = [column for column in best if shares[column] == shares[best[0]]]
            if all(str(value).isdecimal() for column in equal for value in self.values(column)):  # others are counts
                equal = [column for column in equal if column.lower() in IMAGE_NUMBERS] or equal
            if len(equal) > 1 and not exact:
                raise self.undecided(f"{' and '.join(equal)} hold pictures", "--image COLUMN")
            return equal[0]
        named = [column for column in self.columns if column.lower() in (*FILE_COLUMNS, *IMAGES)]
        remote = [
            column for column in named if any(str(v).startswith(("http://", "https://")) for v in self.values(column))
        ]
        if remote:
            raise self.undecided(
                f"{remote[0]} holds addresses on the web, which are not downloaded here. Download the pictures "
                "(img2dataset does) and name their files"
            )
        if has_messages:
            return named[0] if named else ""
        if named:
            missing = next((str(value) for value in self.values(named[0])), "")
            raise self.undecided(
                f"no picture was found for the column {named[0]}: {missing[:100]!r} is not below the folder"
                + (". Write paths that are relative to it" if os.path.isabs(missing) else ""),
                "" if os.path.isabs(missing) else "--media-dir FOLDER",
            )
        raise self.undecided("none of its columns holds or names pictures", "--image COLUMN")

    def pictured(self, column: str) -> float:
        """The share of a column's values that are pictures: bytes, or names of files that exist."""
        values = self.values(column)
        return sum(is_picture(value, self.media) for value in values[:20]) / max(1, min(len(values), 20))

    def texts(self, found: Roles) -> Roles:
        """The question, the answer or the class of a row that is not a conversation."""
        answer = self.chosen.answer or self.named(ANSWERS)
        question = self.chosen.question or self.named(QUESTIONS)
        if question is None and answer is not None:  # alone it is what a picture was made of
            question = self.named(ASKING)
        if self.chosen.label is not None and self.chosen.answer is None:
            return replace(found, prompts=LABEL_PROMPTS, answer="{label}")
        if question and not answer:
            found = replace(found, question=question)
            answer = self.answered(self.named(LABELS)) or self.caption(found)
        if question and answer and question != answer:
            return self.asked(found, question, answer)
        if question and self.chosen.answer is None:
            raise self.undecided(
                f"{question} is a question, and no column is known to be its answer", "--answer COLUMN"
            )
        if (caption := self.chosen.answer or self.caption(found) or answer) is not None:
            label = None if self.chosen.answer else self.scalar(self.named(LABELS))
            if label and {str(int(v) if isinstance(v, bool) else v) for v in self.values(label)} == {"0", "1"}:
                raise self.undecided(
                    f"{caption} holds texts, and {label} is 0 or 1 in each row, which may say whether the text is true",
                    f"--answer {caption}, or --label {label} to learn the number",
                )
            return replace(found, caption=caption, label=label, prompts=CAPTION_PROMPTS, answer="{caption}")
        label = self.scalar(self.named(LABELS)) or self.classes(found)
        if label is not None:
            return replace(found, label=label, prompts=LABEL_PROMPTS, answer="{label}")
        if len(texts := [column for column in self.others(found) if self.is_text(column)]) == 1:
            return replace(found, caption=texts[0], prompts=CAPTION_PROMPTS, answer="{caption}")
        raise self.undecided("none of its columns is a caption, an answer or a class", "--answer COLUMN")

    def caption(self, found: Roles) -> str | None:
        """The one column of captions, by its name or as the only prose."""
        by_name = [column for name in CAPTIONS for column in self.columns if column.lower() == name]
        captions = self.different(by_name or self.prose(found))
        if len(captions) > 1:
            raise self.undecided(f"{' and '.join(captions)} could each be the answer", "--answer COLUMN")
        return captions[0] if captions else None

    def is_text(self, column: str) -> bool:
        return all(isinstance(value, str) for value in self.values(column))

    def asked(self, found: Roles, question: str, answer: str) -> Roles:
        """A row's own question and its answer; Alpaca's input is a line below the question."""
        choices = self.named(CHOICES) or self.lettered()
        if choices and self.chosen.answer is None and all(_is_number_of_choice(v) for v in self.values(answer)):
            numbers = [int(value) for value in self.values(answer) if str(value).isdecimal()]
            if numbers and min(numbers) > 0:
                raise self.undecided(
                    f"{answer} holds numbers of {choices}, and none is 0, so whether they count from 1 is unknown. "
                    "Write the answers' texts",
                    f"--answer COLUMN, or --answer {answer} to learn the number",
                )
            found = replace(found, question=question, caption=answer, choices=choices)
            return replace(found, prompts=("{question}\n{choices}",), answer="{caption}")
        several = "most" if any(isinstance(value, list) for value in self.values(answer)) else None
        found = replace(found, question=question, caption=answer, several=several)
        found = replace(found, prompts=("{question}",), answer="{caption}")
        if self.named(("input",)) and question.lower() == "instruction":
            column = self.named(("input",))
            found = replace(found, prompts=(f"{{question}}\n{{{column}}}",))
        return replace(found, system=self.named(("system",)), history=self.named(("history",)))

    def lettered(self) -> tuple[str, ...]:
        """The columns of the choices, where each has its own, called by its letter."""
        by_name = {column.lower(): column for column in self.columns}
        for prefix in CHOICE_PREFIXES:
            found = list(takewhile(bool, (by_name.get(f"{prefix}{letter}") for letter in "abcdefghij")))
            if len(found) > 1:
                return tuple(filter(None, found))
        return ()

    def named(self, names: Iterable[str]) -> str | None:
        """The column of the first of some names that has texts or numbers."""
        return next((c for name in names for c in self.columns if c.lower() == name and self.values(c)), None)

    def scalar(self, column: str | None) -> str | None:
        """A column only where its values are texts or numbers, and no boxes."""
        return column if column and all(isinstance(value, str | int) for value in self.values(column)) else None

    def answered(self, column: str | None) -> str | None:
        """A column whose values are texts or numbers, or lists of them, as ChartQA's are."""
        items = [
            item for value in self.values(column or "") for item in (value if isinstance(value, list) else [value])
        ]
        return column if items and all(isinstance(item, str | int | float) for item in items) else None

    def first_unique(self, names: Iterable[str]) -> str | None:
        for name in names:
            for column in self.columns:
                values = [str(value) for value in self.values(column)]
                if column.lower() == name and len(values) == len(self.rows) and len(set(values)) == len(values):
                    return column
        return None

    def prose(self, found: Roles) -> list[str]:
        """Columns of texts that are mostly different and have spaces."""
        return [c for c in self.others(found) if _share(self.values(c), lambda v: isinstance(v, str) and " " in v) > 0.5
                and len(set(map(str, self.values(c)))) > MAX_CLASSES * len(self.values(c))]  # fmt: skip

    def classes(self, found: Roles) -> str | None:
        """The one column of short texts that come again."""
        fit = [
            column
            for column in self.others(found)
            if _share(self.values(column), lambda value: isinstance(value, str) and len(value) < 100) == 1
            and 1 < len(set(self.values(column))) <= max(2, MAX_CLASSES * len(self.values(column)))
        ]
        if len(fit) > 1:
            raise self.undecided(f"{' and '.join(fit)} could each be the class", "--label COLUMN")
        return fit[0] if fit else None

    def others(self, found: Roles) -> list[str]:
        taken = {
            found.image,
            found.id,
            found.question,
            *FILE_COLUMNS,
            "split",
            "source",
            "license",
            "url",
            "sha256",
            "exif",
        }
        return [c for c in self.columns if c not in taken and c.lower() not in taken and self.values(c)]

    def different(self, columns: list[str]) -> list[str]:
        """Columns without those that say the same in every row."""
        kept: list[str] = []
        for column in dict.fromkeys(columns):
            if all(any(row.get(column) != row.get(other) for row in self.rows) for other in kept):
                kept.append(column)
        return kept

    def undecided(self, why: str, flag: str = "") -> Undecided:
        cure = f" Choose with {flag}." if flag else ""
        first = {name: value if isinstance(value, str) else repr(value)[:80] for name, value in self.rows[0].items()}
        shown = json.dumps(first, ensure_ascii=False)[:300]
        return Undecided(f"{self.where}: {why}.{cure} Its columns: {', '.join(self.columns)}. The first row: {shown}")


def _share(values: Sequence[Any], holds: Callable[[Any], bool]) -> float:
    return sum(map(holds, values)) / len(values) if values else 0.0


def _is_number_of_choice(value: Any) -> bool:
    return isinstance(value, int) or bool(re.fullmatch(r"\d|\(?[A-Za-z]\)?\.?", str(value)))
