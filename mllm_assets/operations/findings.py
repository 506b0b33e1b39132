"""What `mllm-assets doctor` finds, for people and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table.

    Attributes:
        check: What was looked at.
        status: "warn": something will go wrong some day, or for some recipes; "fail": runs go wrong now.
        detail: What was found.
        next_step: One thing to do; empty where all is well.
    """

    check: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    next_step: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def print_findings(findings: Sequence[Finding]) -> None:
    """Print a table, and what it comes to."""
    table = Table("check", "", "found, and what to do", show_lines=False)
    for finding in findings:
        text = finding.detail + (f"\n-> {finding.next_step}" if finding.next_step else "")
        table.add_row(finding.check, f"[{COLORS[finding.status]}]{finding.status}", escape(text))
    console = Console(markup=True, highlight=False)
    console.print(table)
    counts = {status: sum(finding.status == status for finding in findings) for status in COLORS}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))
