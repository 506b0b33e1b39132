"""A worker task outside of the table, for the tests of the process tree: it ignores SIGTERM and hides its children."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mllm_assets.errors import MachineError
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import Task

HOLD = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"


@dataclass(frozen=True, kw_only=True)
class FakeTask(Task[dict[str, Any]]):
    """Does what `what` names, with its traces in `folder`."""

    entry = "tests.fake_tasks:run"
    what: str
    folder: Path
    run_dir: Path | None = None
    bits: int | None = None

    @property
    def quantizes(self) -> bool:
        return self.bits is not None

    @property
    def lock_dir(self) -> Path | None:
        return self.run_dir


def run(task: FakeTask, reporter: Reporter) -> dict[str, Any]:
    return WHAT[task.what](task.folder, reporter)


def _hold(**how: Any) -> int:
    child = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, **how)
    assert child.stdout is not None
    child.stdout.readline()
    return child.pid


def _orphan() -> int:
    """A grandchild whose parent has ended."""
    code = (
        f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {HOLD!r}], stdout=subprocess.PIPE,"
        " start_new_session=True); c.stdout.readline(); print(c.pid)"
    )
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout)


def stubborn(folder: Path, reporter: Reporter) -> Any:
    """Ignores SIGTERM, as do a child, a child in a session of its own, and an orphan."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pids = [os.getpid(), _hold(), _hold(start_new_session=True), _orphan()]
    rank = os.environ.get("RANK", "0")
    path = folder / f"pids.{rank}"
    partial = path.with_name(f"partial.{rank}")
    partial.write_text(" ".join(map(str, pids)))
    partial.rename(path)
    signal.pause()


def waits(folder: Path, reporter: Reporter) -> Any:
    """Ignores SIGTERM, and has no children."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / f"pids.{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    signal.pause()


def reports(folder: Path, reporter: Reporter) -> Any:
    for step in (1, 2):
        reporter.progress("training", step, 2, loss=0.5)
    reporter.warn("half a warning")
    return {"done": True}


def leaves_a_child(folder: Path, reporter: Reporter) -> Any:
    return {"pid": _hold(start_new_session=True)}


def polite(folder: Path, reporter: Reporter) -> Any:
    """Ends on SIGTERM after it has put its things away."""

    def end(*_: Any) -> None:
        (folder / "ended").write_text("in order")
        sys.exit(3)

    signal.signal(signal.SIGTERM, end)
    (folder / "pids.0").write_text(str(os.getpid()))
    signal.pause()


def wrong(folder: Path, reporter: Reporter) -> Any:
    raise MachineError("No CUDA device. Set device: cpu.")


def crash(folder: Path, reporter: Reporter) -> Any:
    raise ZeroDivisionError("one over zero")


def variables(folder: Path, reporter: Reporter) -> Any:
    return {"omp": os.environ.get("OMP_NUM_THREADS"), "own": os.environ.get("OWN"), "stdin": sys.stdin.read()}


def killed(folder: Path, reporter: Reporter) -> Any:
    """Dies with its bar on the line."""
    reporter.progress("train", 3, 9)
    os.kill(os.getpid(), signal.SIGKILL)


def looks_for_bitsandbytes(folder: Path, reporter: Reporter) -> Any:
    return {"is_found": find_spec("bitsandbytes") is not None}


WHAT = {
    do.__name__: do
    for do in (
        stubborn, waits, reports, leaves_a_child, polite, wrong, crash, variables, killed, looks_for_bitsandbytes,
    )
}  # fmt: skip
