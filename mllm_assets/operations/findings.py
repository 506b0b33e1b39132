"""What `mllm-assets doctor` finds, for people and as JSON."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from mllm_assets.errors import MllmAssetsError

MIN_WIDTH = 24
STATUS_WIDTH = 6
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

    @classmethod
    def of_error(cls, check: str, status: Literal["warn", "fail"], error: MllmAssetsError) -> "Finding":
        """An error for people: its first sentence is what was found, the rest what to do."""
        what, _, next_step = str(error).partition(". ")
        return cls(check, status, f"{what.removesuffix('.')}.", next_step)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def print_findings(findings: Sequence[Finding]) -> None:
    """Print a line for each, what to do on a line of its own, and what it comes to.

    What was found is wrapped to a terminal's width at spaces. What to do may hold a command, so it stays one line.
    """
    console = Console(markup=True, highlight=False)
    indent = " " * (STATUS_WIDTH + max((len(finding.check) for finding in findings), default=0) + 2)
    for finding in findings:
        found = [line for part in finding.detail.splitlines() for line in _wrapped(part, console, len(indent))]
        text = finding.check.ljust(len(indent) - STATUS_WIDTH) + f"\n{indent}".join(found)
        step = f"\n{' ' * STATUS_WIDTH}-> {finding.next_step}" if finding.next_step else ""
        color = COLORS[finding.status]
        console.print(f"[{color}]{finding.status:<{STATUS_WIDTH}}[/{color}]{escape(text + step)}", soft_wrap=True)
    counts = {status: sum(finding.status == status for finding in findings) for status in COLORS}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))


def _wrapped(text: str, console: Console, indent: int) -> list[str]:
    if not console.is_terminal:
        return [text]
    width = max(console.width - indent, MIN_WIDTH)
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
