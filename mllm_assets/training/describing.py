"""What a run is about to do, in lines of text for terminal and logs."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_assets.training.checkpoints import Resumable


def trainable_lines(table: Sequence[Mapping[str, Any]], num_params: int) -> list[str]:
    """Return the table of what trains: module, tensors, parameters, share of all; equal layers in one line."""
    rows = [*_folded(table)]
    trained = sum(row["num_params"] for row in table)
    total = ("all that trains", sum(row["num_tensors"] for row in table), trained)
    width = max(len(name) for name, *_ in [*rows, total])
    return [
        f"{'module':<{width}}  tensors      parameters    share",
        *(
            f"{name:<{width}}  {tensors:>7,}  {params:>14,}  {params / num_params:>7.2%}"
            for name, tensors, params in [*rows, total]
        ),
        f"{'of':<{width}}  {'':>7}  {num_params:>14,}",
    ]


def resume_line(resumable: "Resumable", num_steps: int, device: str) -> str:
    """Say from which checkpoint a run goes on, and how exactly."""
    how = "to the same bits" if device == "cpu" else f"exactly but for the last bits of sums on {device}"
    return (
        f"resuming from {resumable.path} after step {resumable.step} of {num_steps}, {how}: weights, optimizer, "
        f"schedule and random states are restored"
    )


def _folded(table: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    folded: list[tuple[str, int, int]] = []
    for _, group in itertools.groupby(enumerate(table), key=_kind):
        rows = [row for _, row in group]
        first, last = rows[0]["module"], rows[-1]["module"].rpartition(".")[2]
        name = first if len(rows) == 1 else f"{first} to {last}"
        folded.append((name, sum(row["num_tensors"] for row in rows), sum(row["num_params"] for row in rows)))
    return folded


def _kind(numbered: tuple[int, Mapping[str, Any]]) -> tuple[Any, ...]:
    """The same for equal layers that follow each other: their number goes up with their place."""
    place, row = numbered
    layer = re.fullmatch(r"(.*\.layers)\.(\d+)", row["module"])
    return (layer[1], int(layer[2]) - place, row["num_tensors"], row["num_params"]) if layer else (row["module"],)
