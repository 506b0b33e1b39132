"""What became of a folder's files and rows: counts that add up, rows as the model will see them, and warnings."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mllm_assets.data.curate.inventory import Inventory
from mllm_assets.data.curate.publish import row_messages
from mllm_assets.data.curate.reading import Reading
from mllm_assets.data.curate.variety import digest_of, variety_warnings
from mllm_assets.data.ingest.source_rows import SourceRow
from mllm_assets.data.ingest.sources import raw_row, read_source
from mllm_assets.data.ingest.spec import DatasetSpec
from mllm_assets.data.quality.verdicts import render_answer
from mllm_assets.data.sharegpt.conversation import ASSISTANT, USER, conversation_defect, read_conversation
from mllm_assets.progress import followed

NUM_SHOWN = 3
MAX_CANDIDATES = 200
MAX_LISTED = 5
SPLIT_WORDS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing"}
MAX_NAMED_FILES = 10_000  # a text file of each image is named by it


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row as the model will see it: where it is, and its turns as (role, text)."""

    location: str
    turns: tuple[tuple[str, str], ...]


@dataclass(kw_only=True, slots=True)
class Count:
    """What all rows of a source use and say; texts are kept as digests."""

    inventory: Inventory
    reading: Reading
    num_rows: int = 0
    num_without_picture: int = 0
    pictures: set[str] = field(default_factory=set)
    answers: Counter[bytes] = field(default_factory=Counter)
    questions: Counter[bytes] = field(default_factory=Counter)

    def add(self, row: SourceRow, spec: DatasetSpec) -> None:
        self.num_rows += 1
        self.num_without_picture += not any(data is not None for data in row.images)
        self.pictures.update(map(str, row.files))
        values = _texts(row)
        if row.messages is not None:
            if conversation_defect(row.messages, row.messages.count("<image>"), 10**9) is None:
                turns = read_conversation(row.messages)
                self.answers[digest_of(next(t["content"] for t in reversed(turns) if t["role"] == ASSISTANT))] += 1
                self.questions[digest_of(next(t["content"] for t in turns if t["role"] == USER))] += 1
        elif row.defect is None:
            self.answers[digest_of(render_answer(values, spec))] += 1
            if question := row.fields.get("question"):
                self.questions[digest_of(question)] += 1

    def files(self) -> tuple[str, ...]:
        """Lines that account for every file."""
        found, used = self.inventory, set(self.reading.annotations)
        left = [path for path in found.pictures if str(path) not in self.pictures]
        num_pictures = len(found.pictures) - len(left)
        not_read = {**dict.fromkeys(found.texts, "text of no image"), **dict.fromkeys(found.rows, "not needed"),
                    **dict.fromkeys(found.tars, "not needed"), **found.not_read, **self.reading.not_read}  # fmt: skip
        not_read = {path: why for path, why in not_read.items() if path not in used}
        num_used = num_pictures + len(used & ({*found.texts, *found.rows, *found.tars, *found.not_read}))
        lines = [
            f"{found.num_files} files: {num_used} used ({num_pictures} images), {len(left)} images without a row, "
            f"{len(not_read)} not read, {found.num_hidden} hidden"
        ]
        lines += [f"  without a row: {self._few(left)}"] if left else []
        by_reason: dict[str, list[Path]] = {}
        for path, why in not_read.items():
            by_reason.setdefault(why, []).append(path)
        lines += [f"  not read: {self._few(paths)}: {why}" for why, paths in by_reason.items()]
        num_with = self.num_rows - self.num_without_picture
        lines.append(f"{self.num_rows} rows: {num_with} with images, {self.num_without_picture} without an image")
        return tuple(lines)

    def _few(self, paths: list[Path]) -> str:
        names = [path.relative_to(self.inventory.folder).as_posix() for path in paths]
        return ", ".join(names[:MAX_LISTED]) + (
            f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        )

    def warnings(self) -> tuple[str, ...]:
        """What is odd about all answers and questions together, and splits that are mixed."""
        return (*variety_warnings(self.answers, self.questions), *self._mixed_splits())

    def _mixed_splits(self) -> tuple[str, ...]:
        """A warning where files of several splits are read as one, so that test rows would be trained on."""
        if (
            self.reading.source.keys() & {"val_split", "split_column"}
            or len(self.reading.annotations) > MAX_NAMED_FILES
        ):
            return ()
        names = [path.relative_to(self.inventory.folder).as_posix().lower() for path in self.reading.annotations]
        words = {word for name in names for word in re.findall("[a-z]+", name) if word in SPLIT_WORDS}
        if len(words) < 2:
            return ()
        return (
            f"files of {' and '.join(sorted(words))} are read as one and split again, so each may be trained on. "
            "Add those to train on alone: with --file, or from a folder of their own",
        )


def count_rows(spec: DatasetSpec, root: Path, inventory: Inventory, reading: Reading) -> Count:
    """Read all rows once."""
    count = Count(inventory=inventory, reading=reading)
    for row in followed(read_source(spec.source, root), "read rows"):
        count.add(row, spec)
    return count


def show_first(rows: Iterable[SourceRow], spec: DatasetSpec, shown: list[ShownRow | None]) -> Iterator[SourceRow]:
    """The same rows; the first are put into `shown` as the model will see them, None for one with a defect."""
    for number, row in enumerate(rows):
        if len(shown) < MAX_CANDIDATES:
            whole = row.defect is None and _is_whole(row, spec)
            turns = row_messages(spec, _texts(row), number, len(row.images)) if whole else []
            texts = tuple((turn["role"], turn["content"]) for turn in turns)
            shown.append(ShownRow(row.location, texts) if whole else None)
        yield row


def _is_whole(row: SourceRow, spec: DatasetSpec) -> bool:
    if row.messages is not None:
        return conversation_defect(row.messages, len(row.images), 10**9) is None
    return bool(render_answer(_texts(row), spec).strip())


def _texts(row: SourceRow) -> dict[str, str | None]:
    values = raw_row(row, Counter())
    return {name: values[name] for name in ("caption", "label", "messages", "fields")}
