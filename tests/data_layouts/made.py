"""What the layouts are written with."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.unit.data.made_datasets import png

NUM_ROWS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """A row: its pictures' bytes, its turns as (role, text) without `<image>` where it is put first, its own id."""

    pictures: tuple[bytes, ...]
    turns: tuple[str, ...]
    id: str | None = None


Layout = Callable[[Path], list[Expected]]


LAYOUTS: dict[str, Layout] = {}


def layout(write: Layout) -> Layout:
    LAYOUTS[write.__name__] = write
    return write


def said(n: int) -> str:
    return f"A lamp, a kite and {n} stones"


def put(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def lines(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def captioned(ids: Sequence[str] | None = None) -> list[Expected]:
    return [Expected(pictures=(png(n),), turns=(said(n),), id=ids[n] if ids else None) for n in range(NUM_ROWS)]


def asked(question: str = "How many stones in {n}?", answer: str = "{n} stones", **fields: Any) -> list[Expected]:
    return [
        Expected(pictures=(png(n),), turns=(question.format(n=n), answer.format(n=n)), **fields)
        for n in range(NUM_ROWS)
    ]


def pictures(folder: Path, name: str = "{n}.png") -> None:
    for n in range(NUM_ROWS):
        put(folder / name.format(n=n), png(n))


def parquet(path: Path, **columns: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_csv(path: Path, rows: Sequence[Sequence[Any]], **options: Any) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, **options).writerows(rows)
    put(path, buffer.getvalue())
