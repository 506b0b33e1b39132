"""Ctrl-C and SIGTERM while one process waits for another: raised where the wait can be cut short, and never lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_held: list[Callable[[], object]] = []  # signals are the process's, and so is what holds them


@contextmanager
def held_back() -> Iterator[None]:
    """Hold a first interrupt back until `raise_held` or the end of the block; a second one is raised at once.

    A handler that raises runs wherever the main thread is, also in a finalizer or a weak reference's callback, which
    the garbage collector calls at any moment. Python prints an exception there and goes on: the interrupt is lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    raising = {number: handler for number, handler in handlers.items() if callable(handler)}

    def hold(number: int, frame: FrameType | None) -> None:
        handler = raising[signal.Signals(number)]
        if _held:
            handler(number, frame)
        _held.append(lambda: handler(number, None))

    for number in raising:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in raising.items():
            signal.signal(number, handler)
        raise_held()  # also where the block fails: a worker that ended by the same signal would be tried again


def raise_held() -> None:
    """Raise the interrupt that is held back, as its own handler would have.

    Raises:
        BaseException: KeyboardInterrupt, Dagster's interrupt, or what else the handler raises.
    """
    if _held:
        first = _held[0]
        _held.clear()
        first()
