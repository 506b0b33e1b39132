"""What the board starts: asked to stop it ends; if it does not, a second request kills it, and both are said."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from mllm_assets.cli.board.launches import PROCESSES, Launch, Launches

DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@contextmanager
def launched(code: str, *, patience_s: float) -> Iterator[Launch]:
    """A process that has run `code` and then sleeps."""
    command = [sys.executable, "-c", f"import time\n{code}\nprint('ready', flush=True)\ntime.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield Launch(title="long", process=process, patience_s=patience_s)
        process.kill()


def test_a_run_is_asked_once_and_has_its_time() -> None:
    with launched(DEAF, patience_s=500) as launch:
        assert launch.state == "running"
        assert launch.stop().startswith("Stopping")
        assert launch.state.startswith("stopping for 0 s")
        assert launch.stop().startswith("It is stopping already. If it has not ended in ")
        assert launch.is_running


def test_a_run_that_does_not_hear_is_killed_by_a_second_stop() -> None:
    """An interrupt was lost once: the run trained on, and the page said "Stopping" for ever."""
    with launched(DEAF, patience_s=0) as launch:
        launch.stop()
        assert "Stop again kills it" in launch.state
        assert launch.stop().startswith("Killed")
        assert launch.process.wait() == -signal.SIGKILL
        assert launch.state == "killed"


def test_a_run_that_hears_ends_at_once() -> None:
    with launched("", patience_s=0) as launch:
        launch.stop()
        launch.process.wait()
        assert launch.state == "stopped"


def test_a_run_is_told_how_many_processes_train(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").touch()
    launches = Launches(tmp_path, tmp_path)
    launch = launches.start("mine", ["max_steps=1"], num_processes=2)
    try:
        assert psutil.Process(launch.process.pid).environ()[PROCESSES] == "2"
        assert launch.lines[0] == f"$ {PROCESSES}=2 mllm-assets run mine max_steps=1"
    finally:
        launches.stop_all()
