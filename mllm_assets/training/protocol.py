"""What launcher and worker say to each other: exit codes, error file, progress.

The launcher writes REQUEST.json and reads RESULT.json: `{"result": {...}}`, or `{"error": {"type", "message"}}` with
exit code 2. Progress goes to the terminal, or to Dagster when the worker runs under Dagster Pipes.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import IO, Any

from mllm_assets import errors
from mllm_assets.errors import MllmAssetsError
from mllm_assets.redaction import redacted_value
from mllm_assets.training.ranks import is_first_rank

EXIT_OK = 0
EXIT_USER_ERROR = 2  # never retried; every other code is a crash, and a new attempt resumes

PIPES_VARIABLES = ("DAGSTER_PIPES_CONTEXT", "DAGSTER_PIPES_MESSAGES")


def error_payload(error: MllmAssetsError) -> dict[str, str]:
    return {"type": _public_class(type(error)).__name__, "message": str(error)}


def error_from_payload(payload: dict[str, str]) -> MllmAssetsError:
    """Make the worker's error again in the launcher, as the class that says who should act."""
    kind = getattr(errors, payload["type"], MllmAssetsError)
    return kind(payload["message"])


def _public_class(kind: type[MllmAssetsError]) -> type[MllmAssetsError]:
    return next(base for base in kind.__mro__ if base.__module__ == errors.__name__)


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
        """Say that `done` of `total` steps of a stage are over, with facts such as `loss` or `samples_per_s`."""
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            self._stage, self._stage_started, self._last_emitted = stage, now, float("-inf")
        if self._stream is not None:
            self._show(stage, done, total, facts)
        if self._emit is not None and (done >= total or now - self._last_emitted >= self._min_interval_s):
            self._last_emitted = now
            elapsed_s = round(now - self._stage_started, 1)
            text = ", ".join([f"{stage} {done}/{total}", *(f"{name} {_short(fact)}" for name, fact in facts.items())])
            message = {"text": text, "stage": stage, "done": done, "total": total, "elapsed_s": elapsed_s}
            self._emit({**message, **facts})

    def say(self, text: str) -> None:
        """Say something that a person may want to know."""
        if self._stream is not None:
            self._write_line(text)
        if self._emit is not None:
            self._emit({"text": text})

    def warn(self, text: str) -> None:
        """Say something once that a person should know; kept in `warnings` for the result."""
        if text in self.warnings:
            return
        self.warnings.append(text)
        if self._stream is not None:
            self._write_line(f"warning: {text}")
        if self._emit is not None:
            self._emit({"text": f"warning: {text}", "warning": text})

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

    def _write_line(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=self._stream)


def _short(fact: float) -> str:
    return f"{fact:.4g}" if isinstance(fact, float) else str(fact)


def _report_redacted(report: Callable[[dict[str, Any]], None], message: dict[str, Any]) -> None:
    report(redacted_value(message))


@contextmanager
def open_reporter() -> Iterator[Reporter]:
    """The reporter for this process: to Dagster under Pipes, otherwise to the terminal; silent on every rank but 0."""
    with ExitStack() as stack:
        emit, stream = None, None
        if is_first_rank():
            if all(name in os.environ for name in PIPES_VARIABLES):
                from dagster_pipes import open_dagster_pipes

                session = open_dagster_pipes()
                stack.callback(session.close)  # left as a context it would send an exception's text as it is
                emit = partial(_report_redacted, session.report_custom_message)
            else:
                stream = sys.stderr
        reporter = Reporter(emit=emit, stream=stream)
        stack.callback(reporter.close)
        yield reporter
