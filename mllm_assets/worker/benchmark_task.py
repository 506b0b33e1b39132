"""The worker's task of `benchmarks`: a model is asked by lmms-eval, which has an environment of its own."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mllm_assets.errors import RecipeError
from mllm_assets.worker.tasks import Manifest, RecipeTask

TRIED = "0.7.3"  # the version of lmms-eval
INSTALLS = f"lmms-eval=={TRIED} 'filelock<4.3'"  # it reaches into filelock, for what 4.3 no longer has
DEFAULT_PYTHON = ".lmms-eval/bin/python"
MAX_TASKS = 64
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkSettings:
    """Benchmarks of lmms-eval that the base and the tuned model are asked.

    Attributes:
        tasks: Names of lmms-eval's tasks, its own or those below `folder`.
        folder: A folder of the project that holds tasks of your own. What they name with `!function` is code, and runs.
        python: The Python of the environment that has lmms-eval, relative to the project's root.
        limit: How many rows of each task are asked, the first ones; null: all.
        max_new_tokens: Tokens after which an answer is cut, also where a task asks for more.
        download: Let lmms-eval fetch data from the Hub, with HF_TOKEN where that is set. Without it, it is offline.
    """

    tasks: tuple[str, ...]
    folder: str | None = None
    python: str = DEFAULT_PYTHON
    limit: int | None = None
    max_new_tokens: int = 1024
    download: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.tasks) <= MAX_TASKS:
            raise RecipeError(f"benchmarks: tasks has {len(self.tasks)} names: expected 1 to {MAX_TASKS}.")
        if wrong := [name for name in self.tasks if not _NAME.fullmatch(name)]:
            raise RecipeError(
                f"benchmarks: tasks names {wrong[0][:100]!r}, which no task of lmms-eval can be called. Name a task as "
                "its YAML does (`task:`), for example ai2d; the folder of your own is `folder`."
            )
        if len(set(self.tasks)) < len(self.tasks):
            raise RecipeError(f"benchmarks: tasks names one twice: {', '.join(self.tasks)}. Leave it out.")
        if self.folder is not None and (Path(self.folder).is_absolute() or ".." in Path(self.folder).parts):
            raise RecipeError(f"benchmarks: folder is {self.folder!r}: expected one of the project, such as tasks.")
        for name in ("limit", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RecipeError(f"benchmarks: {name} is {value}: expected 1 or more.")

    def identity(self) -> dict[str, Any]:
        """What decides about answers."""
        return {name: value for name, value in asdict(self).items() if name not in ("python", "download")}


@dataclass(frozen=True, kw_only=True)
class BenchmarkTask(RecipeTask[Manifest]):
    """Let lmms-eval ask one model, which is served on this machine for as long as that takes.

    Attributes:
        recipe: Whose turn format the model is asked in.
        model: What it is called there: `base` or `tuned`.
        model_digest: What names it; another model in its place is refused.
        python: Of lmms-eval's environment.
        root: The project's, in which lmms-eval runs: its tasks' paths are relative to it.
        folder: Where tasks of the user's own are.
        directory: Where samples, figures and the log go; a complete one is returned unchanged.
        lineage: What the directory is named by.
    """

    entry = "mllm_assets.evaluation.benchmark_worker:benchmark_task"
    model: str
    model_dir: Path
    model_digest: str
    settings: BenchmarkSettings
    python: Path
    root: Path
    folder: Path | None
    directory: Path
    lineage: dict[str, Any]
