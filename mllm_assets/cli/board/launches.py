"""Runs that a page starts and stops: each is a `mllm-assets run` of its own, so that Dagster keeps its history."""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mllm_assets.errors import RecipeError, did_you_mean
from mllm_assets.redaction import redacted

MAX_LINES = 200  # of a run's output that are kept
GRACE_S = 60  # a run that is stopped ends its worker first


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One command, its process and the end of what it printed."""

    title: str
    process: subprocess.Popen[str]
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_LINES))

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def state(self) -> str:
        """In a few words."""
        code = self.process.poll()
        if code is None:
            return "running"
        named = {0: "finished", 1: "ended with failed gates or assets", 2: "refused", 130: "stopped"}
        return named.get(code, "stopped" if code == -signal.SIGTERM else f"ended with exit code {code}")


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

    def start(self, recipe: str, overrides: Sequence[str] = ()) -> Launch:
        """Start a recipe of `configs/`, by its name.

        Raises:
            RecipeError: There is none of this name, it is running already, or an override is not `key=value`.
        """
        known = sorted(path.stem for path in self._root.glob("configs/*.yaml"))
        if recipe not in known:
            raise RecipeError(f"configs/ has no recipe {recipe!r}. {did_you_mean(recipe, known)}Write it first.")
        if wrong := [text for text in overrides if "=" not in text or text.startswith("-")]:
            raise RecipeError(f"{wrong[0]!r}: expected key=value, for example max_steps=60.")
        title = " ".join([recipe, *overrides])
        with self._lock:
            if any(launch.title == title and launch.is_running for launch in self._launches):
                raise RecipeError(f"{title} is running already: see its log.")
            process = subprocess.Popen(
                [sys.executable, "-m", "mllm_assets.cli", "run", f"{recipe}.yaml", *overrides],
                cwd=self._project,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, "MLLM_ASSETS_ROOT": str(self._root), "NO_COLOR": "1"},
                start_new_session=True,  # Ctrl-C reaches the page only, which then stops its runs in order
            )
            launch = Launch(title=title, process=process)
            self._launches.append(launch)
        threading.Thread(target=_read, args=[launch], daemon=True).start()
        return launch

    def stop(self, title: str) -> Launch:
        """Stop a run as Ctrl-C would: what was finished is kept, and the same command goes on from there.

        Raises:
            RecipeError: No such run is running.
        """
        for launch in reversed(self._launches):
            if launch.title == title and launch.is_running:
                launch.process.send_signal(signal.SIGTERM)
                return launch
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
