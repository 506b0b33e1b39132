"""A person's yes or no to a release: lines that are only ever added to `releases/<recipe>/approvals.jsonl`.

A decision is about one model and the answers that it was judged by. Other weights, or other answers, wait for another.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import read_manifest
from mllm_assets.decisions import (
    MAX_WHO_CHARS,
    MAX_WHY_CHARS,
    now_text,
    one_line,
    read_decision_file,
    write_decision_file,
)
from mllm_assets.errors import RecipeError
from mllm_assets.evaluation.gates import APPROVAL, GateResult
from mllm_assets.layout import Layout
from mllm_assets.releases.versions import releases_lock

APPROVALS = "approvals.jsonl"
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
    when: str = field(default_factory=now_text)
    why: str = ""
    seen: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, limit in (("who", MAX_WHO_CHARS), ("why", MAX_WHY_CHARS)):
            object.__setattr__(self, name, one_line(name, getattr(self, name), limit))
        if not self.who:
            raise RecipeError("A decision needs the name of who makes it: give --who NAME.")
        if not (self.approved or self.why):
            raise RecipeError("A refusal needs its reason: give --why TEXT.")

    def __str__(self) -> str:
        return f"{'approved' if self.approved else 'refused'} by {self.who} on {self.when}" + (
            f": {self.why}" if self.why else ""
        )


def decide(layout: Layout, recipe: str, decision: Decision) -> None:
    """Add a decision; the last one about a subject counts.

    Raises:
        IntegrityError: The file is damaged.
    """
    with releases_lock(layout, recipe):
        write_decision_file(
            layout.releases(recipe) / APPROVALS, [*read_decisions(layout, recipe), decision], max_mib=MAX_FILE_MIB
        )


def read_decisions(layout: Layout, recipe: str) -> list[Decision]:
    """All decisions about a recipe's models, the oldest first.

    Raises:
        IntegrityError: A line is not one of ours, or the file is larger than any of ours gets. Names the line.
    """
    return read_decision_file(
        layout.releases(recipe) / APPROVALS,
        _read,
        max_mib=MAX_FILE_MIB,
        cure=f"Correct the line, or delete it and decide again: mllm-assets approve {recipe}",
    )


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
