"""The findings of `mllm-assets doctor`, as text and as JSON."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
        status: "warn": something will go wrong some day, or for some recipes; "fail": runs go wrong now.
        next_step: One thing to do; empty if all is well.
    """

    check: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    next_step: str = ""

    @classmethod
    def of_error(cls, check: str, status: Literal["warn", "fail"], error: MllmAssetsError) -> "Finding":
        """From one of our errors: its first sentence is what was found, the rest what to do."""
        what, _, next_step = str(error).partition(". ")
        return cls(check, status, f"{what.removesuffix('.')}.", next_step)


def print_findings(findings: Sequence[Finding]) -> None:
    """Print a line for each, its next step on a line of its own, and the counts.

    A detail is wrapped at spaces to a terminal's width. A next step may hold a command, so it stays one line.
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
