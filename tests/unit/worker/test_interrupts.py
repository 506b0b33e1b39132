"""An interrupt that comes while a process waits for another is raised once, whatever else happens meanwhile."""

import os
import signal
from collections.abc import Iterator

import pytest

from mllm_assets.worker.interrupts import held_back, raise_held


class Stopped(BaseException):
    """What the handler raises, as Dagster's does."""


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Stopped

    previous = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, previous)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_is_raised_where_the_wait_asks_or_ends() -> None:
    with pytest.raises(Stopped), held_back():
        interrupt()
        raised_at = "the end"
        raise_held()
        raised_at = "nowhere"
    assert raised_at == "the end"
    with pytest.raises(Stopped), held_back():
        interrupt()


def test_it_is_raised_although_the_block_fails_too() -> None:
    """Where all processes were told to end at once, the step counted as crashed, and was tried again."""
    with pytest.raises(Stopped) as raised, held_back():
        interrupt()
        raise RuntimeError("the worker was ended by signal 15")
    assert isinstance(raised.value.__context__, RuntimeError)


def test_a_second_one_is_raised_at_once_and_none_is_left_over() -> None:
    with pytest.raises(Stopped), held_back():
        interrupt()
        interrupt()
        raise AssertionError("went on")
    with held_back():
        raise_held()


def test_a_block_within_a_block_loses_none() -> None:
    with pytest.raises(Stopped), held_back():
        interrupt()
        with held_back():
            pass
        raise_held()
        raise AssertionError("went on")
