"""Runs and evaluations that a page starts and stops, each a command of its own: of runs Dagster keeps the history."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mllm_assets.errors import RecipeError, did_you_mean
from mllm_assets.redaction import redacted

MAX_LINES = 200  # of a run's output that are kept
PROCESSES = "MLLM_ASSETS_NUM_PROCESSES"
GRACE_S = 60  # a run that is stopped ends its worker first
PATIENCE_S = 30  # longer than a worker's grace; a second Stop kills then


@dataclass(kw_only=True, slots=True)
class Launch:
    """One command, its process, the end of what it printed, and when it was asked to stop (monotonic)."""

    title: str
    process: subprocess.Popen[str]
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_LINES))
    stop_asked_s: float | None = None
    patience_s: float = PATIENCE_S

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def state(self) -> str:
        """In a few words."""
        code = self.process.poll()
        if code is None:
            return self._stopping() if self.stop_asked_s is not None else "running"
        named = {0: "finished", 1: "ended with failed gates or assets", 2: "refused", 130: "stopped"}
        named |= {-signal.SIGTERM: "stopped", -signal.SIGKILL: "killed"}
        return named.get(code, f"ended with exit code {code}")

    def _stopping(self) -> str:
        waited_s = time.monotonic() - (self.stop_asked_s or 0.0)
        if waited_s < self.patience_s:
            return f"stopping for {waited_s:.0f} s; it ends its worker first"
        return f"has not stopped in {waited_s:.0f} s. Stop again kills it; what was saved is kept"

    def stop(self) -> str:
        """Ask it to end as Ctrl-C would, or kill it if it was asked long ago; returns what happens now.

        Started again, it goes on from what it has saved in both cases: a run may end at any instant.
        """
        if self.stop_asked_s is None:
            self.stop_asked_s = time.monotonic()
            self.process.send_signal(signal.SIGTERM)
            return "Stopping: what was finished is kept, and started again it goes on from there."
        left_s = self.stop_asked_s + self.patience_s - time.monotonic()
        if left_s > 0:
            return f"It is stopping already. If it has not ended in {left_s:.0f} s, Stop kills it."
        self.process.kill()  # its supervisor sees that, and ends the worker
        return "Killed: what was saved is kept, and started again it goes on from there."


class Launches:
    """What this page has started, the newest last; all of it is stopped with the page.

    Args:
        project: The working directory of the commands.
        root: The folder of `configs/`, `data/` and `outputs/`.
    """

    def __init__(self, project: Path, root: Path) -> None:
        self._project, self._root = project, root
        self._launches: list[Launch] = []
        self._lock = threading.Lock()

    @property
    def all(self) -> Sequence[Launch]:
        return tuple(self._launches)

    def start(self, recipe: str, overrides: Sequence[str] = (), *, num_processes: int | None = None) -> Launch:
        """Start a recipe of `configs/`, by its name; `num_processes` instead of what the environment says.

        Raises:
            RecipeError: There is none of this name, it is running already, or an override is not `key=value`.
        """
        known = sorted(path.stem for path in self._root.glob("configs/*.yaml"))
        if recipe not in known:
            raise RecipeError(f"configs/ has no recipe {recipe!r}. {did_you_mean(recipe, known)}Write it first.")
        if wrong := [text for text in overrides if "=" not in text or text.startswith("-")]:
            raise RecipeError(f"{wrong[0]!r}: expected key=value, for example max_steps=60.")
        title = " ".join([recipe, *overrides])
        is_other = num_processes and str(num_processes) != os.environ.get(PROCESSES, "1")
        environment = {PROCESSES: str(num_processes)} if is_other else {}
        command = ["run", f"{recipe}.yaml", *overrides]
        return self._begin(title, command, shown=["run", recipe, *overrides], environment=environment)

    def evaluate(self, model: str, entries: Sequence[str], options: Sequence[str]) -> Launch:
        """Ask a model about entries, with options of `mllm-assets evaluate`.

        Raises:
            RecipeError: It is being asked already.
        """
        command = ["evaluate", model, *(f"--on={entry}" for entry in entries), *options]
        return self._begin(f"{model} on {', '.join(entries)}", command, shown=command, environment={})

    def _begin(
        self, title: str, arguments: Sequence[str], *, shown: Sequence[str], environment: Mapping[str, str]
    ) -> Launch:
        with self._lock:
            if any(launch.title == title and launch.is_running for launch in self._launches):
                raise RecipeError(f"{title} is running already: see its log.")
            process = subprocess.Popen(
                [sys.executable, "-m", "mllm_assets.cli", *arguments],
                cwd=self._project,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, "MLLM_ASSETS_ROOT": str(self._root), "NO_COLOR": "1", **environment},
                start_new_session=True,  # Ctrl-C reaches the page only, which then stops its runs in order
            )
            launch = Launch(title=title, process=process)
            variables = "".join(f"{name}={value} " for name, value in environment.items())
            launch.lines.append(f"$ {variables}mllm-assets {shlex.join(shown)}")
            self._launches.append(launch)
        threading.Thread(target=_read, args=[launch], daemon=True).start()
        return launch

    def find(self, title: str | None) -> Launch | None:
        """The newest of a title."""
        return next((launch for launch in reversed(self._launches) if launch.title == title), None)

    def stop(self, title: str) -> str:
        """Stop a run, see `Launch.stop`.

        Raises:
            RecipeError: No such run is running.
        """
        for launch in reversed(self._launches):
            if launch.title == title and launch.is_running:
                return launch.stop()
        raise RecipeError(f"{title} is not running.")

    def stop_all(self) -> None:
        """Stop what is still running, and wait for it."""
        running = [launch for launch in self._launches if launch.is_running]
        for launch in running:
            print(f"stopping {launch.title}; started again it goes on from its last checkpoint", flush=True)
            launch.process.send_signal(signal.SIGTERM)
        for launch in running:
            try:
                launch.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                launch.process.kill()
                launch.process.wait()


def _read(launch: Launch) -> None:
    assert launch.process.stdout is not None
    for line in launch.process.stdout:
        launch.lines.append(redacted(line.rstrip("\n"))[:500])
    launch.process.wait()
