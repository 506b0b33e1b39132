"""Decisions of people about samples: lines that are only ever added to `corrections/<dataset>.jsonl`.

A decision is about a sample's content, its images and texts: it holds in every later version of the source that has the
same content, wherever it is there, and for each of its repeats. Undo is a further line.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, Literal, get_args

from filelock import FileLock

from mllm_assets.artifacts import sha256_file
from mllm_assets.data.sharegpt.conversation import text_defect
from mllm_assets.decisions import (
    MAX_WHO_CHARS,
    MAX_WHY_CHARS,
    now_text,
    one_line,
    read_decision_file,
    write_decision_file,
)
from mllm_assets.errors import DataError, RecipeError
from mllm_assets.layout import Layout

Action = Literal["relabel", "drop", "keep", "undo"]
RELABEL, DROP, KEEP, UNDO = ACTIONS = get_args(Action)
MAX_ANSWER_CHARS = 65_536
MAX_FILE_MIB = 64
_CONTENT_ID = re.compile("[0-9a-f]{16}")


def content_id(sample_id: str) -> str:
    """The part of a sample's id that is its content: without the number of a repeat or the name of a changed copy.

    Raises:
        DataError: It is no sample's id.
    """
    found = re.split("[-+]", sample_id.strip(), maxsplit=1)[0]
    if not _CONTENT_ID.fullmatch(found):
        raise DataError(f"{sample_id[:40]!r} is no sample's id, which begins with 16 digits 0-9 and a-f.")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """One line of the file.

    Attributes:
        sample_id: The content that it is about.
        action: Another answer (relabel), no row of it in any split (drop), right as it is (keep), or the decision
            before this one taken back (undo).
        old: The source's own answer, as the person saw it.
        new: The answer instead; of relabel only.
        who: A person's name, at most 100 characters.
        when: ISO 8601, UTC.
        why: At most 2,000 characters.
    """

    sample_id: str
    action: Action
    old: str = ""
    new: str = ""
    who: str
    when: str = field(default_factory=now_text)
    why: str = ""

    def __post_init__(self) -> None:
        for name, limit in (("who", MAX_WHO_CHARS), ("why", MAX_WHY_CHARS)):
            object.__setattr__(self, name, one_line(name, getattr(self, name), limit))
        if not self.who:
            raise RecipeError("A decision needs the name of who makes it: give --who NAME.")
        if not _CONTENT_ID.fullmatch(self.sample_id):
            raise DataError(f"{self.sample_id[:40]!r} is not the content of a sample.")
        if self.action not in ACTIONS:
            raise DataError(f"{self.action!r:.40} is no decision: expected one of {', '.join(ACTIONS)}.")
        datetime.fromisoformat(self.when)
        if (self.action == RELABEL) != bool(self.new.strip()):
            raise DataError("relabel needs the new answer, and nothing else has one.")
        if max(len(self.old), len(self.new)) > MAX_ANSWER_CHARS:
            raise DataError(f"An answer may have {MAX_ANSWER_CHARS:,} characters, and this has more.")
        if defect := text_defect(self.new):
            raise DataError(f"The new answer cannot be trained on: {defect.replace('_', ' ')}. Write it as plain text.")

    def __str__(self) -> str:
        what = f"relabel to {self.new!r}" if self.action == RELABEL else self.action
        return f"{what} by {self.who} on {self.when}" + (f": {self.why}" if self.why else "")


def add_corrections(layout: Layout, dataset: str, new: Sequence[Correction]) -> None:
    """Add decisions, all of them or none.

    Raises:
        DataError: There is nothing to undo, or there would be more than can be read.
        IntegrityError: The file is damaged.
    """
    path = layout.corrections(dataset)
    lock = layout.settled(dataset, f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        known = read_corrections(layout, dataset)
        held = Counter({sample_id: len(stack) for sample_id, stack in _stacks(known).items()})
        for one in new:
            if one.action == UNDO and not held[one.sample_id]:
                raise DataError(f"{one.sample_id}: nothing was decided about it, so there is nothing to undo.")
            held[one.sample_id] += -1 if one.action == UNDO else 1
        write_decision_file(path, [*known, *new], max_mib=MAX_FILE_MIB)


def read_corrections(layout: Layout, dataset: str) -> list[Correction]:
    """All decisions about a dataset's samples, the oldest first.

    Raises:
        IntegrityError: A line is not one of ours, or the file is larger than any of ours gets. Names the line.
    """
    return read_decision_file(
        layout.corrections(dataset), _read, max_mib=MAX_FILE_MIB, cure="Correct the line, or delete it."
    )


def corrections_digest(layout: Layout, dataset: str) -> str:
    """Identifies the file as it is now."""
    path = layout.corrections(dataset)
    return sha256_file(path)[:16] if path.is_file() else "none"


def in_force(corrections: Iterable[Correction]) -> dict[str, Correction]:
    """The decision that counts about each content: the last one that was not taken back."""
    return {sample_id: stack[-1] for sample_id, stack in _stacks(corrections).items() if stack}


def _stacks(corrections: Iterable[Correction]) -> dict[str, list[Correction]]:
    stacks: dict[str, list[Correction]] = {}
    for one in corrections:
        stack = stacks.setdefault(one.sample_id, [])
        if one.action != UNDO:
            stack.append(one)
        elif stack:  # of two files that were merged each may take back the same one
            stack.pop()
    return stacks


def _read(values: Any) -> Correction:
    if values.keys() != {item.name for item in fields(Correction)}:
        raise ValueError("other fields")
    if not all(isinstance(text, str) for text in values.values()):
        raise TypeError("not a text")
    return Correction(**values)
