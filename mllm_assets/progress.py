"""Lines about long work, one every few seconds: the work follows its rows, and who starts it says where lines go."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

EVERY_S = 10.0
T = TypeVar("T")


class _Teller:
    """Gives lines to `notify`; what is being done is said again where nothing else was for a while."""

    def __init__(self, notify: Callable[[str], object]) -> None:
        self._notify, self._told_s = notify, time.monotonic()
        self._doing: list[tuple[str, float]] = []  # the innermost last, and since when
        self._lock = threading.Lock()

    def tell(self, line: str) -> None:
        self._told_s = time.monotonic()
        self._notify(line)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        with self._lock:
            self._doing.append((what, time.monotonic()))
            is_first = len(self._doing) == 1
        ended = threading.Event()
        thread = threading.Thread(target=self._repeat, args=(ended,), name="progress", daemon=True)
        if is_first:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            with self._lock:
                self._doing.pop()
            if is_first:
                thread.join()  # one that is left at the end of the process keeps what nanobind then names

    def _repeat(self, ended: threading.Event) -> None:
        while not ended.wait(max(EVERY_S / 10, self._told_s + EVERY_S - time.monotonic())):
            with self._lock:
                if not self._doing or time.monotonic() < self._told_s + EVERY_S:
                    continue
                what, since_s = self._doing[-1]
            self.tell(f"{what}, for {time.monotonic() - since_s:,.0f} s")


_teller: ContextVar[_Teller | None] = ContextVar("teller", default=None)


@contextmanager
def progress_to(notify: Callable[[str], object]) -> Iterator[None]:
    """Give the lines of what runs inside to `notify`, from another thread too; without it nobody is told."""
    token = _teller.set(_Teller(notify))
    try:
        yield
    finally:
        _teller.reset(token)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """What runs inside, or a function that this decorates, has no rows to count: `write the database, for 20 s`."""
    if (teller := _teller.get()) is None:
        yield
        return
    with teller.doing(what):
        yield


def followed(rows: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The same rows. Every few seconds a line says how many there were: `read rows 12,000/500,000, 1,350 a second`."""
    if (teller := _teller.get()) is None:
        yield from rows
        return
    started_s = last_s = time.monotonic()
    of_all = "" if total is None else f"/{total:,}"
    for number, row in enumerate(rows, 1):
        yield row
        if (now_s := time.monotonic()) - last_s >= EVERY_S:
            teller.tell(f"{what} {number:,}{of_all}, {number / (now_s - started_s):,.0f} a second")
            last_s = now_s
