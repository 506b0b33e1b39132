"""A person's yes or no to a release: lines that are only ever added to `releases/<recipe>/approvals.jsonl`.

A decision is about one model and the answers that it was judged by. Other weights, or other answers, wait for another.
It is a record, not a signature: whoever may write the folder may write it.
"""

import getpass
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import read_manifest, write_text_atomic
from mllm_assets.errors import IntegrityError, RecipeError
from mllm_assets.evaluation.gates import APPROVAL, GateResult
from mllm_assets.layout import Layout
from mllm_assets.releases.versions import releases_lock

APPROVALS = "approvals.jsonl"
MAX_WHO_CHARS, MAX_WHY_CHARS = 100, 2000
MAX_FILE_MIB = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What a decision is about: a model by its weights, and its answers."""

    weights_digest: str
    predictions_digest: str

    @classmethod
    def of(cls, metrics_dir: Path) -> "Subject":
        """That of a recipe's metrics.

        Raises:
            IntegrityError: They are not complete.
        """
        inputs = read_manifest(metrics_dir)["inputs"]
        return cls(weights_digest=inputs["weights_digest"], predictions_digest=inputs["predictions"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One line of the file.

    Attributes:
        who: A person's name, at most 100 characters.
        when: ISO 8601, UTC.
        why: At most 2,000 characters; a refusal needs it.
        seen: The figures and gates that were shown, as texts by name.
    """

    subject: Subject
    approved: bool
    who: str
    when: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    why: str = ""
    seen: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, limit in (("who", MAX_WHO_CHARS), ("why", MAX_WHY_CHARS)):
            text = " ".join(getattr(self, name).split())
            if len(text) > limit or not text.isprintable():
                raise RecipeError(f"{name} must be at most {limit:,} printable characters, and has {len(text):,}.")
            object.__setattr__(self, name, text)
        if not self.who:
            raise RecipeError("A decision needs the name of who makes it: give --who NAME.")
        if not (self.approved or self.why):
            raise RecipeError("A refusal needs its reason: give --why TEXT.")

    def __str__(self) -> str:
        return f"{'approved' if self.approved else 'refused'} by {self.who} on {self.when}" + (
            f": {self.why}" if self.why else ""
        )


def user_name() -> str:
    """That of the person at this machine; empty for a user without one, as in a container."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""


def decide(layout: Layout, recipe: str, decision: Decision) -> None:
    """Add a decision; the last one about a subject counts.

    Raises:
        IntegrityError: The file is damaged.
    """
    with releases_lock(layout, recipe):
        known = [*read_decisions(layout, recipe), decision]
        path = layout.releases(recipe) / APPROVALS
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(one), ensure_ascii=False) for one in known]
        write_text_atomic(path, "".join(f"{line}\n" for line in lines))


def read_decisions(layout: Layout, recipe: str) -> list[Decision]:
    """All decisions about a recipe's models, the oldest first.

    Raises:
        IntegrityError: A line is not one of ours, or the file is larger than any of ours gets. Names the line.
    """
    path = layout.releases(recipe) / APPROVALS
    if not path.is_file():
        return []
    if path.stat().st_size > MAX_FILE_MIB * 2**20:
        raise IntegrityError(f"{path} is larger than {MAX_FILE_MIB} MiB, which no list of decisions is. Look at it.")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            found.append(_read(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecipeError) as error:
            raise IntegrityError(
                f"{path}:{number} is not a decision ({type(error).__name__}), so none of the file is used. Correct the "
                f"line, or delete it and decide again: mllm-assets approve {recipe}"
            ) from None
    return found


def _read(values: dict[str, Any]) -> Decision:
    values["subject"] = Subject(**values["subject"])
    texts = [values["who"], values["when"], values["why"], *asdict(values["subject"]).values(), *values["seen"]]
    texts += values["seen"].values()
    if values.keys() != {item.name for item in fields(Decision)} or not isinstance(values["approved"], bool):
        raise ValueError("other fields")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("not a text")
    return Decision(**values)


def approval_gate(recipe: str, decisions: list[Decision], subject: Subject) -> GateResult:
    """Judge whether a person said yes to this model by these answers."""
    about = [decision for decision in decisions if decision.subject == subject]
    command = f"mllm-assets approve {recipe}"
    if about:
        last = about[-1]
        text = f"{last}" if last.approved else f"It was {last}. To decide again: {command}"
    else:
        text = f"It waits for a person's yes. To see its figures and decide: {command}"
    return GateResult(
        name=APPROVAL,
        passed=bool(about) and about[-1].approved,
        description=text,
        observed=None,
        threshold=None,
    )
