"""The process that a launcher keeps from one task to the next: shared where nothing changed, and never left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mllm_assets.errors import DataError
from mllm_assets.worker import forks, interrupts
from mllm_assets.worker.launch import load_ahead, run_worker
from mllm_assets.worker.tasks import Accelerator, BuildTask
from tests.fake_tasks import FakeTask
from tests.integration.conftest import wait_for
from tests.worker_tasks import evaluation

pytestmark = pytest.mark.integration
LAUNCHER = """
import sys, time
from pathlib import Path
from mllm_assets.worker import forks
from mllm_assets.worker.launch import run_worker
from mllm_assets.worker.tasks import BuildTask
run_worker(BuildTask(directory=Path(sys.argv[1])))
print(forks.kept().supervisor.pid, flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    forks.end_kept()
    yield
    forks.end_kept()


def supervisor_after(task: BuildTask) -> psutil.Process:
    run_worker(task)
    kept = forks.kept()
    assert kept is not None
    return psutil.Process(kept.supervisor.pid)


@pytest.mark.slow
def test_tasks_share_a_process_until_a_variable_or_the_folder_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = supervisor_after(BuildTask(directory=tmp_path / "1"))
    again = supervisor_after(BuildTask(directory=tmp_path / "2"))
    assert again == first
    digests = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("1", "2")]
    assert digests[0] == digests[1]
    with pytest.raises(DataError, match="There is no .*dataset_info.json"):
        run_worker(evaluation(model_dir=tmp_path, data_dir=tmp_path, directory=tmp_path / "p"))
    assert supervisor_after(BuildTask(directory=tmp_path / "3")) == first, "a user's error ends the fork alone"
    assert "nanobind" not in capfd.readouterr().err, "what a fork does not free is named at its end"

    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "7")  # read on import
    other = supervisor_after(BuildTask(directory=tmp_path / "4"))
    assert other != first and not first.is_running()
    monkeypatch.chdir(tmp_path)
    assert supervisor_after(BuildTask(directory=tmp_path / "5")) != other and not other.is_running()


def test_libraries_that_are_loaded_ahead_serve_the_first_task(tmp_path: Path) -> None:
    load_ahead(Accelerator(), (BuildTask.entry,), grace_s=10.0)
    ahead = forks.kept()
    assert ahead is not None
    load_ahead(Accelerator(), (BuildTask.entry,), grace_s=10.0)
    assert forks.kept() is ahead, "one is enough"
    assert supervisor_after(BuildTask(directory=tmp_path / "1")).pid == ahead.supervisor.pid


def test_an_interrupt_is_raised_while_libraries_still_load() -> None:
    """They may take 20 s, before Python's files of them are compiled."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as loading:
        waiting = forks.Forks(supervisor=loading, channel=ours, mark="", conditions=None)
        with pytest.raises(KeyboardInterrupt), interrupts.held_back():
            os.kill(os.getpid(), signal.SIGINT)
            waiting.takes()
        waiting.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_arrives_in_a_finalizer_is_not_lost(number: signal.Signals, tmp_path: Path) -> None:
    class Collected:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # the handler runs here, where Python ignores what it raises

    waiting = [Collected()]

    def raising(number: int, frame: object) -> None:
        raise InterruptedError(number)

    previous = signal.signal(number, raising)
    task = FakeTask(what="variables", folder=tmp_path)
    try:
        with pytest.raises(InterruptedError):
            run_worker(task, env={"PYTHONPATH": str(Path(__file__).parents[2])}, on_poll=waiting.clear)
        assert signal.getsignal(number) is raising
    finally:
        signal.signal(number, previous)


def test_a_task_of_another_package_leaves_no_process(tmp_path: Path) -> None:
    run_worker(FakeTask(what="variables", folder=tmp_path), env={"PYTHONPATH": str(Path(__file__).parents[2])})
    assert forks.kept() is None


@pytest.mark.slow
@pytest.mark.parametrize("which", ["supervisor", "its child"])
def test_a_kept_process_that_was_killed_meanwhile_is_replaced(which: str, tmp_path: Path) -> None:
    supervisor = supervisor_after(BuildTask(directory=tmp_path / "1"))
    [child] = supervisor.children()
    {"supervisor": supervisor, "its child": child}[which].kill()
    assert supervisor_after(BuildTask(directory=tmp_path / "2")) != supervisor
    wait_for(lambda: not child.is_running(), "the end of the child")


@pytest.mark.slow
@pytest.mark.parametrize("ended_by", ["its end", "SIGKILL"])
def test_a_kept_process_ends_with_its_launcher(ended_by: str, tmp_path: Path) -> None:
    wait_s = "0" if ended_by == "its end" else "600"
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "1"), wait_s]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        supervisor = int(launcher.stdout.readline())
        if ended_by == "SIGKILL":
            tree = psutil.Process(supervisor).children(recursive=True)
            assert len(tree) == 1
            os.kill(launcher.pid, signal.SIGKILL)
            wait_for(lambda: not any(process.is_running() for process in tree), "the end of the process")
        launcher.wait(600)
    if ended_by == "its end":
        assert not psutil.pid_exists(supervisor), "the launcher waits for it"
    wait_for(lambda: not psutil.pid_exists(supervisor), "the end of the supervisor")
