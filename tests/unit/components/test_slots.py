"""What `slots free` says."""

from pathlib import Path

import pytest

from mllm_assets.cli import main


def test_nothing_to_free_is_said_unless_it_is_to_be_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a word it is unclear whether the command did anything."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    assert main(["slots", "free"]) == 0
    assert capsys.readouterr().out == "Nothing to free: no killed run holds a slot.\n"
    assert main(["slots", "free", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
