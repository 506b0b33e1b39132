"""What is printed for a terminal can be copied from it."""

import re

import pytest

from mllm_assets.operations.findings import Finding, print_findings
from mllm_assets.tables import print_table

PATH = "outputs/emoji_trans_projector_head_sft/0123456789abcdef/checkpoint-1200"
COMMAND = "mllm-assets releases rollback emoji_trans_projector_head_sft v12 && mllm-assets releases list"
COLUMNS = ["what", "path", "MiB", "why it can go"]
ROWS = [["run", PATH, "12.5", "three newer runs of its recipe are finished, and nothing names it"]]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return monkeypatch


def show(capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_table(COLUMNS, ROWS, numbers=["MiB"], prose=["why it can go"])
    return re.sub(r"\033\[[0-9;]*m", "", capsys.readouterr().out).splitlines()


@pytest.mark.parametrize("width", [40, 80, 115, 150])
def test_a_path_is_whole_at_every_width(
    terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    """Tables cut what did not fit, and a path that ends in an ellipsis cannot be copied."""
    terminal.setenv("COLUMNS", str(width))
    lines = show(capsys)
    assert any(PATH in line for line in lines) and not any("…" in line for line in lines)
    too_wide = [line.split() for line in lines if len(line) > width]
    assert all(words[0] in ("path", "why") for words in too_wide), "a value alone on its line, which the terminal wraps"
    assert "nothing names it" in " ".join(" ".join(lines).split())


def test_what_is_piped_has_a_line_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert [line.split() for line in show(capsys) if PATH in line] == [" ".join(ROWS[0]).split()]


def test_doctor_wraps_what_it_found_and_never_a_command(
    terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.setenv("COLUMNS", "60")
    print_findings([Finding("slots", "warn", f"{'many words ' * 12}in {PATH}", COMMAND)])
    lines = capsys.readouterr().out.splitlines()
    assert f"-> {COMMAND}" in lines[-2] and any(PATH in line for line in lines)
    assert all(len(line) < 80 for line in lines if COMMAND not in line and PATH not in line)
