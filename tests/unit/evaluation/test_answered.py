"""What an interrupted evaluation keeps: whole lines only, and those of its own model, whatever happened to the file."""

from pathlib import Path

import pytest

from mllm_assets.evaluation.answered import AnsweredRows, forget
from mllm_assets.worker.tasks import WHOLE, Part

SIZES = {"losses": 4, "answers": 4}


def kept(folder: Path, model: str = "tuned", part: Part = WHOLE) -> AnsweredRows:
    return AnsweredRows(folder, model, part, SIZES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / ".p.01234567.tmp"
    rows = kept(folder)
    rows.add("losses", [2, 0], [(0.1 + 0.2, 7), (float("inf"), 1)])
    rows.add("answers", [3], [("eine Fichte \u2028 \ud800 \x00\n", 4, 0.25)])
    return folder


def test_what_was_kept_is_read_back_to_the_bit(folder: Path) -> None:
    assert kept(folder).known == {
        "losses": {2: (0.1 + 0.2, 7), 0: (float("inf"), 1)},
        "answers": {3: ("eine Fichte \u2028 \ud800 \x00\n", 4, 0.25)},
    }


def test_another_number_of_processes_goes_on_from_it_and_another_model_does_not(folder: Path) -> None:
    kept(folder, part=Part(index=1, count=2)).add("losses", [1], [(1.0, 1)])
    assert set(kept(folder, part=Part(index=0, count=3)).known["losses"]) == {0, 1, 2}
    assert kept(folder, "base").known == {"losses": {}, "answers": {}}


@pytest.mark.parametrize("bit", range(8))
def test_a_line_with_a_flipped_bit_counts_as_never_written(folder: Path, bit: int) -> None:
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    expected = kept(folder).known
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        found = kept(folder).known
        assert all(found[name].items() <= expected[name].items() for name in SIZES), at


def test_a_line_that_a_kill_cut_off_costs_its_own_rows_only(folder: Path) -> None:
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    rows = kept(folder)
    assert rows.known == {"losses": {}, "answers": {}}
    rows.add("losses", [1], [(0.5, 3)])
    assert kept(folder).known["losses"] == {1: (0.5, 3)}


@pytest.mark.parametrize(
    "line", [b"null", b"[]", b'{"digest": null}', b"[" * 100_000, b"\xff", b'{"pass": [], "rows": 3, "digest": "x"}']
)
def test_lines_of_anything_else_are_passed_over(folder: Path, line: bytes) -> None:
    (path,) = folder.iterdir()
    expected = kept(folder).known
    path.write_bytes(line + b"\n" + path.read_bytes() + b"\n" + line)
    assert kept(folder).known == expected


def test_complete_predictions_leave_nothing_of_it(folder: Path) -> None:
    other = folder.with_name(".q.01234567.tmp")
    other.mkdir()
    forget(folder.with_name("p"))
    assert not folder.exists() and other.exists()
