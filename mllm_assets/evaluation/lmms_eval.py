"""lmms-eval in an environment of its own: whether it is there, and a run of it as a process below this one."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.errors import DataError, MachineError
from mllm_assets.redaction import environment_secrets, redacted
from mllm_assets.worker import supervisor
from mllm_assets.worker.benchmark_task import DEFAULT_PYTHON, INSTALLS, BenchmarkSettings

LOG = "lmms_eval.log"
OUTPUT = "output"
POLL_S = 0.2
TAIL_BYTES = 8192
MAX_SHOWN = 600  # characters of an error
HUB_TOKEN = "HF_TOKEN"  # noqa: S105
OF_THIS_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "DAGSTER_PIPES_CONTEXT", "DAGSTER_PIPES_MESSAGES")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RESPONDING = re.compile(r"Model Responding: *\d+%\|[^|]*\| *(\d+)/(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class LmmsEval:
    """An environment that has lmms-eval."""

    python: Path
    version: str


def find_lmms_eval(root: Path, python: str) -> LmmsEval:
    """Look whether an environment has lmms-eval.

    Raises:
        MachineError: It has not, or is not there. Gives the command that makes one.
    """
    path = root / python  # a link of a virtual environment leads out of it
    folder = path.parent.parent
    make = f"python -m venv {folder} && {folder}/bin/pip install {INSTALLS}"
    if not path.is_file():
        raise MachineError(f"benchmarks: there is no {path}. Make an environment for lmms-eval with: {make}")
    ask = "from importlib.metadata import version; print(version('lmms_eval'))"
    try:
        done = subprocess.run(
            [str(path), "-c", ask], env=variables(None, download=False), capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"benchmarks: {path} does not run ({error}). Make it again with: {make}") from None
    if done.returncode:
        own = root / DEFAULT_PYTHON
        make = f"python -m venv {own.parent.parent} && {own.parent}/pip install {INSTALLS}"
        make += "" if path == own else " (and delete `python` of the benchmarks)"
        raise MachineError(
            f"benchmarks: the environment of {path} has no lmms-eval, which needs one of its own. Make it with: {make}"
        )
    return LmmsEval(python=path, version=done.stdout.strip()[:40])


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How lmms-eval reaches a model: the server's address and key, and the model's name there."""

    address: str
    api_key: str
    model: str


def run_lmms_eval(
    python: Path,
    settings: BenchmarkSettings,
    asking: Asking,
    *,
    root: Path,
    folder: Path | None,
    into: Path,
    on_poll: Callable[[int | None], None],
) -> Path:
    """Run it until it ends; what it wrote is below `into`.

    Args:
        python: Of its environment.
        settings: What is asked.
        asking: Whom.
        root: Where it runs.
        folder: Of the user's own tasks.
        into: Where its output and its log go.
        on_poll: Called about five times a second with the number of questions, None as long as that is not known.

    Returns:
        The folder with its output.

    Raises:
        DataError: It ended without figures. Says what it said last.
    """
    output, log = into / OUTPUT, into / LOG
    command = [str(python), "-m", "lmms_eval", "--model", "openai", "--batch_size", "1", "--log_samples"]
    # one after another, so that its answers have an order, and no second try: what fails here fails for a reason
    in_order = "num_concurrent=1,prefix_aware_queue=false,max_retries=1"
    reached = f"model_version={asking.model},base_url={asking.address}/v1,{in_order}"
    command += ["--model_args", reached, "--output_path", str(output), "--tasks", ",".join(settings.tasks)]
    command += ["--include_path", str(folder)] if folder else []
    command += ["--limit", str(settings.limit)] if settings.limit else []
    environment = variables(asking, download=settings.download)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        with _ended(process):
            while process.poll() is None:
                on_poll(num_questions(_tail(log)))
                time.sleep(POLL_S)
    if process.returncode or not list(output.glob("*/*_results.json")):
        offline = "" if settings.download else " It was offline: a benchmark of the Hub needs `download: true`."
        raise DataError(
            f"lmms-eval ended with exit code {process.returncode} and without figures: {last_words(_tail(log))}."
            f"{offline} Correct the task, or benchmarks.tasks."
        )
    return output


@contextmanager
def _ended(process: subprocess.Popen[bytes]):
    """End the process and all below it, however the block ends."""
    try:
        yield
    finally:
        if process.poll() is None:
            below = supervisor.tree(process.pid) if supervisor.IS_LINUX else []
            process.kill()
            supervisor.send(below, signal.SIGKILL)
        process.wait()


def variables(asking: Asking | None, *, download: bool) -> dict[str, str]:
    """This process's variables without its secrets and what is of its own environment alone."""
    hidden = {*environment_secrets(), *OF_THIS_ENVIRONMENT} - ({HUB_TOKEN} if download else set())
    found = {name: value for name, value in os.environ.items() if name not in hidden}
    around = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1")))
    found |= {"NO_PROXY": around, "no_proxy": around, "CUDA_VISIBLE_DEVICES": ""}  # the model has the GPU
    found |= {} if download else OFFLINE
    return found | ({"OPENAI_API_KEY": asking.api_key} if asking else {})


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def num_questions(log: str) -> int | None:
    """How many questions its progress bar counts, if that has begun."""
    found = _RESPONDING.findall(log)
    return int(found[-1][1]) if found else None


def last_words(log: str) -> str:
    """The error at a log's end, or its last line, without secrets."""
    lines = [line.strip() for line in _COLOUR.sub("", log).splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    text = (errors or lines or ["it said nothing"])[-1]
    return redacted(text)[:MAX_SHOWN].rstrip(".")
