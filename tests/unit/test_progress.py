"""Whoever starts long work is told how far it is, every few seconds and not at every row."""

import re
import threading

import pytest

from mllm_assets import progress
from mllm_assets.progress import doing, followed, progress_to


def test_long_work_says_how_far_it_is_and_short_work_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with progress_to(told.append):
        assert list(followed("abc", "read rows", 3)) == ["a", "b", "c"]
        assert not told
        monkeypatch.setattr(progress, "EVERY_S", 1e-9)
        list(followed("abc", "read rows", 3))
        list(followed("a", "check rows"))
    assert re.fullmatch(r"read rows 3/3, [\d,]+ a second", told[2])
    assert re.fullmatch(r"check rows 1, [\d,]+ a second", told[3])
    list(followed("abc", "read rows"))
    assert len(told) == 4


def test_work_without_rows_to_count_says_what_it_does_and_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing the quality database was silent for minutes."""
    told: list[str] = []
    heard, inside = threading.Event(), threading.Event()

    def tell(line: str) -> None:
        told.append(line)
        (inside if line.startswith("write") else heard).set()

    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    with progress_to(tell), doing("assess"):
        assert heard.wait(60)
        with doing("write the database"):
            assert inside.wait(60)
        heard.clear()
        assert heard.wait(60), "the outer work goes on"
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
    assert all(re.fullmatch(r"(assess|write the database), for \d+ s", line) for line in told)
