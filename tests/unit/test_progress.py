"""Whoever starts long work is told how far it is, every few seconds and not at every row."""

import re

import pytest

from mllm_assets import progress
from mllm_assets.progress import followed, progress_to


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
