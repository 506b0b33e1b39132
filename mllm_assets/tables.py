"""Rows on a terminal without cutting what a user may copy: as a table if it fits, otherwise a few lines per row."""

from collections.abc import Collection, Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 10_000
MIN_PROSE_WIDTH = 12


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Collection[str] = (),
    prose: Collection[str] = (),
) -> None:
    """Print rows with a text for each column; if the output is not a terminal its width does not count.

    Columns in `numbers` are aligned to the right. The text of those in `prose` may be wrapped, that of no other.
    """
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=PIPED_WIDTH)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        is_prose = column in prose
        table.add_column(
            column,
            justify="right" if column in numbers else "left",
            no_wrap=not is_prose,
            min_width=MIN_PROSE_WIDTH if is_prose else None,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    wide = console.options.update(max_width=PIPED_WIDTH)
    if Measurement.get(console, wide, table).minimum <= console.width:
        console.print(table)
        return
    for row in rows:
        pieces = [f"{column} {text}" for column, text in zip(columns, row, strict=True) if text]
        print(*_filled(pieces, console.width), sep="\n  ")


def _filled(pieces: Sequence[str], width: int) -> Iterator[str]:
    """Lines of complete pieces; one that is wider than the terminal has a line of its own, which the terminal wraps."""
    line = ""
    for piece in pieces:
        if line and cell_len(line) + cell_len(piece) + 4 > width:
            yield line
            line = ""
        line += f"{'  ' if line else ''}{piece}"
    yield line
