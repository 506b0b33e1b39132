"""However a task ends, no process of it stays. Real processes; the tasks ignore SIGTERM and hide in other sessions."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mllm_assets.errors import MachineError, RecipeError
from mllm_assets.worker import supervisor
from mllm_assets.worker.launch import WorkerCrashed, run_worker
from mllm_assets.worker.tasks import Accelerator, to_json
from tests.fake_tasks import FakeTask

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]

LAUNCHER = """
import json, sys
from mllm_assets.worker.launch import run_worker
from mllm_assets.worker.tasks import from_json
run_worker(from_json(json.loads(sys.argv[1])), grace_s=0.3)
"""


def heed_signals() -> None:
    """A test run started by nohup or in a script's background hands ignored signals on; a user's terminal does not.

    SIGTERM too: where SIGINT is ignored, a Dagster run earlier in the same process has left SIGTERM ignored.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class World:
    """A folder with the tasks, and a token by which every process of this test is known."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = uuid.uuid4().hex
        self.env = {"PYTHONPATH": str(ROOT), "TEST_TOKEN": self.token, "OMP_NUM_THREADS": "1"}

    def task(self, what: str, **more: Any) -> FakeTask:
        return FakeTask(what=what, folder=self.folder, **more)

    def run(self, what: str, *, on_poll: Callable[[], None] | None = None, grace_s: float = 0.3, **more: Any) -> Any:
        return run_worker(self.task(what, **more), env=self.env, on_poll=on_poll, grace_s=grace_s)

    def launch(self, what: str, **more: Any) -> subprocess.Popen[bytes]:
        """Run the launcher in a process of its own, and wait until the task's tree is up."""
        command = [sys.executable, "-c", LAUNCHER, json.dumps(to_json(self.task(what, **more)))]
        process = subprocess.Popen(
            command, env={**os.environ, **self.env}, stderr=subprocess.DEVNULL, preexec_fn=heed_signals
        )
        wait_until(self.is_up, timeout_s=60)
        return process

    def is_up(self) -> bool:
        return (self.folder / "pids.0").exists()

    def pids(self) -> list[int]:
        return [int(pid) for path in self.folder.glob("pids.*") for pid in path.read_text().split()]

    def alive(self) -> list[psutil.Process]:
        """Every process with the token, wherever it hangs, this one excepted."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TEST_TOKEN") == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


def wait_until(condition: Callable[[], bool], *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Cancelled(Exception):
    pass


@pytest.fixture
def world(tmp_path: Path):
    world = World(tmp_path)
    yield world
    for process in world.alive():  # so that a failing test leaves nothing either
        process.kill()


def cancel_when_up(world: World) -> Callable[[], None]:
    def on_poll() -> None:
        if world.is_up():
            assert len(world.alive()) >= 5, "supervisor, worker and its three"
            raise Cancelled

    return on_poll


def test_cancel_ends_children_that_ignore_sigterm_hide_in_sessions_or_are_orphans(world: World) -> None:
    with pytest.raises(Cancelled):
        world.run("stubborn", on_poll=cancel_when_up(world))
    assert len(world.pids()) == 4
    assert world.alive() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_process_stays_when_the_launcher_is_ended_by(number: signal.Signals, world: World) -> None:
    """kill -9 gives the launcher no chance to clean up: the closed pipe must be enough."""
    launcher = world.launch("stubborn")
    assert len(world.alive()) >= 6
    os.kill(launcher.pid, number)
    launcher.wait(300)
    wait_until(lambda: world.alive() == [], timeout_s=20)


def test_ctrl_c_on_a_terminal_twice_leaves_nothing(world: World) -> None:
    """It goes to the whole foreground group, and impatient people press it again while the first one works."""
    command = [sys.executable, "-c", LAUNCHER, json.dumps(to_json(world.task("stubborn")))]
    launcher = subprocess.Popen(
        command,
        env={**os.environ, **world.env},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    wait_until(world.is_up, timeout_s=60)
    for _ in range(2):
        os.killpg(launcher.pid, signal.SIGINT)
        time.sleep(0.15)
    launcher.wait(300)
    wait_until(lambda: world.alive() == [], timeout_s=20)


def test_a_launcher_elsewhere_that_gives_no_sign_of_life_ends_the_task(world: World) -> None:
    """On a cluster no pipe leads to the launcher, so that a killed one would leave its job training."""
    heartbeat, path = world.folder / "heartbeat", world.folder / "task.json"
    path.write_text(json.dumps(to_json(world.task("stubborn"))))
    worker = [sys.executable, "-m", "mllm_assets.worker", str(path), str(world.folder / "result.json")]
    command = [sys.executable, supervisor.__file__, "0.3", f"2:{heartbeat}", *worker]
    process = subprocess.Popen(command, env={**os.environ, **world.env}, stdin=subprocess.DEVNULL)
    started_s = time.monotonic()

    def is_up_for_long() -> bool:
        heartbeat.write_text(str(time.monotonic()))
        return world.is_up() and time.monotonic() - started_s > 4

    wait_until(is_up_for_long, timeout_s=60)
    assert process.poll() is None, "it ended while its launcher lived"
    process.wait(300)
    wait_until(lambda: world.alive() == [], timeout_s=5)


def test_launcher_and_supervisor_killed_at_once_leave_no_rank(world: World) -> None:
    """Nobody is left to clean up: each process below must go with its parent."""
    launcher = world.launch("waits", accelerator=Accelerator(num_processes=2))
    wait_until((world.folder / "pids.1").exists, timeout_s=60)
    supervisor = psutil.Process(launcher.pid).children()[0]
    assert len(world.alive()) == 5, "launcher, supervisor, torchrun and two ranks"
    for pid in (supervisor.pid, launcher.pid):
        os.kill(pid, signal.SIGKILL)
    launcher.wait(300)
    wait_until(lambda: world.alive() == [], timeout_s=20)


def test_a_killed_worker_is_a_crash_that_names_the_signal_and_leaves_nothing(world: World) -> None:
    launched: list[int] = []

    def kill_worker() -> None:
        if world.is_up() and not launched:
            launched.append(int((world.folder / "pids.0").read_text().split()[0]))
            os.kill(launched[0], signal.SIGKILL)

    with pytest.raises(WorkerCrashed, match=r"was ended by signal 9 .* lower the batch size.* run it again") as caught:
        world.run("stubborn", on_poll=kill_worker)
    assert caught.value.is_transient
    assert world.alive() == []


@pytest.mark.parametrize("victim", ["supervisor", "loader"])
def test_a_killed_supervisor_or_loader_of_the_libraries_leaves_nothing(world: World, victim: str) -> None:
    """The worker dies with it, its children do not: the launcher or the supervisor finds them by their mark."""
    killed: list[int] = []

    def kill_supervisor() -> None:
        if world.is_up() and not killed:
            worker = psutil.Process(int((world.folder / "pids.0").read_text().split()[0]))
            loader = psutil.Process(worker.ppid())
            killed.append({"loader": loader.pid, "supervisor": loader.ppid()}[victim])
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(WorkerCrashed, match="signal 9"):
        world.run("stubborn", on_poll=kill_supervisor)
    assert world.alive() == []


def test_a_finished_worker_leaves_no_child(world: World) -> None:
    result = world.run("leaves_a_child")
    assert not psutil.pid_exists(result["pid"])
    assert world.alive() == []


def test_the_worker_gets_its_grace(world: World) -> None:
    with pytest.raises(Cancelled):
        world.run("polite", on_poll=lambda: cancel_polite(world), grace_s=20)
    assert (world.folder / "ended").read_text() == "in order"


def cancel_polite(world: World) -> None:
    if world.is_up():
        raise Cancelled


def test_torchrun_ranks_that_ignore_sigterm_are_ended(world: World) -> None:
    """They start sessions of their own, so that ending the process group would miss them."""

    def on_poll() -> None:
        if all((world.folder / f"pids.{rank}").exists() for rank in (0, 1)):
            raise Cancelled

    with pytest.raises(Cancelled):
        world.run("stubborn", on_poll=on_poll, accelerator=Accelerator(num_processes=2))
    assert len(world.pids()) == 8
    assert world.alive() == []


def test_a_users_error_comes_back_as_its_class_and_text(world: World) -> None:
    with pytest.raises(MachineError, match="^No CUDA device. Set device: cpu.$"):
        world.run("wrong")


def test_a_users_error_in_a_rank_comes_back_too(world: World) -> None:
    with pytest.raises(MachineError, match="No CUDA device"):
        world.run("wrong", accelerator=Accelerator(num_processes=2))


def test_a_crash_shows_the_workers_traceback(world: World) -> None:
    with pytest.raises(
        WorkerCrashed, match=r"(?s)exit code 1 and no result.*ZeroDivisionError: one over zero"
    ) as caught:
        world.run("crash")
    assert not caught.value.is_transient, "it would be raised again"


def test_the_worker_gets_threads_and_variables_and_no_stdin(world: World) -> None:
    """A worker that reads the terminal would take the keys of the person who runs the launcher."""
    task = world.task("variables", accelerator=Accelerator(num_threads=2))
    result = run_worker(task, env={"PYTHONPATH": str(ROOT), "OWN": "yes"})
    assert result == {"omp": "2", "own": "yes", "stdin": ""}


def test_two_workers_never_train_in_one_directory(world: World) -> None:
    """A run from Dagster and one from the terminal would mix their checkpoints. A killed worker leaves no lock."""
    run_dir = world.folder / "outputs" / "run"
    first = world.launch("waits", run_dir=run_dir)
    with pytest.raises(MachineError) as caught:
        world.run("variables", run_dir=run_dir)
    assert str(caught.value) == (
        f"Another process is training {run_dir}. Wait for it, or stop it; then the same command resumes."
    )
    first.kill()
    first.wait(300)
    assert world.run("variables", run_dir=run_dir)["stdin"] == ""


def test_progress_and_warnings_reach_dagster_through_pipes(world: World) -> None:
    import dagster as dg

    seen: list[dict[str, Any]] = []

    @dg.asset
    def step(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        with dg.open_pipes_session(
            context=context,
            context_injector=dg.PipesTempFileContextInjector(),
            message_reader=dg.PipesTempFileMessageReader(),
        ) as session:
            env = {**world.env, **session.get_bootstrap_env_vars()}
            assert run_worker(world.task("reports"), env=env) == {"done": True}
        seen.extend(session.get_custom_messages())
        return dg.MaterializeResult()

    with dg.instance_for_test() as instance:
        assert dg.materialize([step], instance=instance).success
    assert [message["text"] for message in seen] == [
        "training 1/2, loss 0.5",
        "training 2/2, loss 0.5",
        "warning: half a warning",
    ]


def test_an_error_class_is_never_invented() -> None:
    from mllm_assets.worker.protocol import error_from_payload, error_payload

    class Special(RecipeError):
        pass

    error = error_from_payload(error_payload(Special("text")))
    assert type(error) is RecipeError and str(error) == "text"
