"""The protocol of launcher and worker: exit codes, error file, progress.

The launcher writes TASK.json and reads RESULT.json: `{"result": {...}}`, or `{"error": {"type", "message"}}` with
exit code 2. Progress goes to the terminal, or to Dagster when the worker runs under Dagster Pipes.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from mllm_assets import errors
from mllm_assets.errors import MllmAssetsError
from mllm_assets.redaction import redacted_value

EXIT_OK = 0
EXIT_USER_ERROR = 2  # never retried; every other code is a crash, and a new attempt resumes
PIPES_VARIABLES = ("DAGSTER_PIPES_CONTEXT", "DAGSTER_PIPES_MESSAGES")


LOST_PEER = "lost the connection to another of its processes, which was killed or whose machine is gone."
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket closed")


def is_lost_peer(crash: BaseException) -> bool:
    """Whether a rank ended because another one is gone, whichever of PyTorch's backends says so."""
    text = str(crash)
    kinds = {base.__name__ for base in type(crash).__mro__}
    return num_ranks() > 1 and bool(kinds & {"DistBackendError", "DistNetworkError"} or any(t in text for t in _LOST))


def error_payload(error: MllmAssetsError) -> dict[str, str]:
    public = next(base for base in type(error).__mro__ if base.__module__ == errors.__name__)
    return {"type": public.__name__, "message": str(error)}


def error_from_payload(payload: dict[str, str]) -> MllmAssetsError:
    """Recreate the worker's error in the launcher, with the class that says who should act."""
    kind = getattr(errors, payload["type"], MllmAssetsError)
    return kind(payload["message"])


class Reporter:
    """Progress and warnings of one task.

    Args:
        emit: Receives each message of at most one every `min_interval_s`, JSON-able; None for the terminal only.
        stream: Where bars and warnings go; None for nowhere.
        min_interval_s: Least time between two emitted messages of one stage; the first and the last always pass.
    """

    def __init__(
        self,
        *,
        emit: Callable[[dict[str, Any]], None] | None = None,
        stream: IO[str] | None = None,
        min_interval_s: float = 2.0,
    ) -> None:
        self._emit = emit
        self._stream = stream
        self._min_interval_s = min_interval_s
        self._stage = ""
        self._stage_started = self._last_emitted = 0.0
        self._bar: Any = None
        self.warnings: list[str] = []

    def progress(self, stage: str, done: int, total: int, **facts: float) -> None:
        """Report that `done` of `total` steps of a stage are done, with facts such as `loss` or `samples_per_s`."""
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            self._stage, self._stage_started, self._last_emitted = stage, now, float("-inf")
        if self._stream is not None:
            self._show(stage, done, total, facts)
        if self._emit is not None and (done >= total or now - self._last_emitted >= self._min_interval_s):
            self._last_emitted = now
            elapsed_s = round(now - self._stage_started, 1)
            text = ", ".join([f"{stage} {done}/{total}", *_fact_texts(facts)])
            message = {"text": text, "stage": stage, "done": done, "total": total, "elapsed_s": elapsed_s}
            self._emit_redacted({**message, **facts})

    def notify(self, text: str) -> None:
        """Send a message to the user."""
        self._write_line(text)
        self._emit_redacted({"text": text})

    def warn(self, text: str) -> None:
        """Send a warning once; kept in `warnings` for the result."""
        if text in self.warnings:
            return
        self.warnings.append(text)
        self._write_line(f"warning: {text}")
        self._emit_redacted({"text": f"warning: {text}", "warning": text})

    def close(self) -> None:
        """End the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, stage: str, done: int, total: int, facts: dict[str, float]) -> None:
        from tqdm import tqdm

        if self._bar is None:
            # Without a terminal (captured logs) a bar every ten seconds is enough
            interval_s = 0.2 if self._stream is not None and self._stream.isatty() else 10.0
            # What was done before, such as the steps up to a checkpoint, does not count for the rate
            self._bar = tqdm(
                desc=stage, total=total, initial=done, file=self._stream, mininterval=interval_s, dynamic_ncols=True
            )
        if facts:
            self._bar.set_postfix({name: _short(fact) for name, fact in facts.items()}, refresh=False)
        self._bar.update(done - self._bar.n)

    def _emit_redacted(self, message: dict[str, Any]) -> None:
        if self._emit is not None:
            self._emit(redacted_value(message))

    def _write_line(self, text: str) -> None:
        if self._stream is not None:
            from tqdm import tqdm

            tqdm.write(text, file=self._stream)


def _fact_texts(facts: Mapping[str, float]) -> list[str]:
    """Facts as a person reads them: `loss 0.31`, `eval 0.35`, `25.8 samples/s`, and last `4 min 25 s left`."""
    order = sorted(facts, key=lambda name: (name == "time_left_s", name != "loss", name != "eval_loss"))
    texts = []
    for name in order:
        if name == "time_left_s":
            texts.append(f"{duration_text(facts[name])} left")
        elif name.endswith("_per_s"):
            texts.append(f"{_short(facts[name])} {name.removesuffix('_per_s')}/s")
        else:
            texts.append(f"{'eval' if name == 'eval_loss' else name} {_short(facts[name])}")
    return texts


def duration_text(seconds: float) -> str:
    """A duration with its two largest units: `4 min 25 s`, `3 h 12 min`."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_min = divmod(minutes, 60)
    if hours:
        return f"{hours} h {rest_min} min"
    return f"{minutes} min {rest_s} s" if minutes else f"{rest_s} s"


def _short(fact: float) -> str:
    return f"{fact:.4g}" if isinstance(fact, float) else str(fact)


@contextmanager
def open_reporter() -> Iterator[Reporter]:
    """The reporter for this process: to Dagster under Pipes, otherwise to the terminal; silent on every rank but 0."""
    with ExitStack() as stack:
        emit, stream = None, None
        if is_first_rank():
            if all(name in os.environ for name in PIPES_VARIABLES):
                from dagster_pipes import open_dagster_pipes

                session = open_dagster_pipes()
                stack.callback(session.close)  # used as a context it would send an exception's text unredacted
                emit = session.report_custom_message
            else:
                stream = sys.stderr
        reporter = Reporter(emit=emit, stream=stream)
        stack.callback(reporter.close)
        yield reporter


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Which of this machine's processes this one is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process writes and reports for all ranks."""
    return rank() == 0
