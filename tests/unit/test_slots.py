"""Which processes count as gone, and what `slots free` says."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mllm_assets.cli import main
from mllm_assets.components.slots import _is_alive


def test_a_killed_process_that_its_parent_has_not_reaped_counts_as_gone() -> None:
    """A signal of 0 reaches a zombie: its run kept the pool slot, and the next `make demo` waited for ever."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert _is_alive(process.pid, time.time())
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not _is_alive(process.pid, time.time())
    process.communicate()


def test_another_process_that_got_the_pid_of_a_dead_one_does_not_keep_its_run_alive() -> None:
    """Pids come round: a killed run stayed "started" for as long as anything had its number."""
    assert _is_alive(os.getpid(), time.time())
    assert not _is_alive(os.getpid(), time.time() - 3600 * 24 * 365)


def test_nothing_to_free_is_said_unless_it_is_to_be_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a word nobody knows whether the command did anything."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    assert main(["slots", "free"]) == 0
    assert capsys.readouterr().out == "Nothing to free: no run that was killed holds a slot.\n"
    assert main(["slots", "free", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
