"""Lines about long work, one every few seconds: the work follows its rows, and who starts it says where lines go."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

EVERY_S = 10.0
T = TypeVar("T")
_notify: ContextVar[Callable[[str], object] | None] = ContextVar("notify", default=None)


@contextmanager
def progress_to(notify: Callable[[str], object]) -> Iterator[None]:
    """Give the lines of what runs inside to `notify`; without it nobody is told."""
    token = _notify.set(notify)
    try:
        yield
    finally:
        _notify.reset(token)


def followed(rows: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The same rows. Every few seconds a line says how many there were: `read rows 12,000/500,000, 1,350 a second`."""
    notify = _notify.get()
    if notify is None:
        yield from rows
        return
    started_s = last_s = time.monotonic()
    of_all = "" if total is None else f"/{total:,}"
    for number, row in enumerate(rows, 1):
        yield row
        if (now_s := time.monotonic()) - last_s >= EVERY_S:
            notify(f"{what} {number:,}{of_all}, {number / (now_s - started_s):,.0f} a second")
            last_s = now_s
