"""Relays a worker's messages to Dagster."""

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import dagster as dg

from mllm_assets.components.instance.step_forks import run_pid
from mllm_assets.components.reporting import rounded
from mllm_assets.process_id import ProcessId
from mllm_assets.training.runs.plan import describe_resume
from mllm_assets.worker.tasks import Task, TrainTask

CANCELLED = "Cancelled; every process of the step has ended."
OBSERVE_EVERY_S = 10.0  # an observation is a database row, so progress is throttled


@contextmanager
def open_session(
    context: dg.AssetExecutionContext, injector: dg.PipesContextInjector, reader: dg.PipesMessageReader
) -> Iterator[dg.PipesSession]:
    """Open a Dagster Pipes session."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # Dagster warns of methods that only it calls
        warnings.simplefilter("ignore", DeprecationWarning)
        with dg.open_pipes_session(context=context, context_injector=injector, message_reader=reader) as session:
            yield session


class ProgressRelay:
    """Passes on every warning, and the newest progress as a line every few seconds; new losses are observed."""

    def __init__(self, context: dg.AssetExecutionContext, key: dg.AssetKey, session: dg.PipesSession):
        self._context, self._key, self._session = context, key, session
        self._num_seen, self._last_s = 0, time.monotonic()
        self._run = ProcessId.of(run_pid())
        self._newest: Mapping[str, Any] | None = None
        self._observed: tuple[Any, Any] = (None, None)
        self.last_text = ""  # of the newest progress, logged or not

    def relay(self) -> None:
        if self._run is None or self._run.has_ended():  # kill -9 of the run worker leaves this step worker alive
            raise dg.Failure(description="The run's process is gone, so this step ends too.", allow_retries=False)
        messages = self._session.get_custom_messages()
        for message in messages[self._num_seen :]:
            if "warning" in message:  # sent only once, so not throttled
                self._context.log.warning(message["warning"])
            elif "stage" not in message:
                self._context.log.info(message["text"])
            else:
                self._newest, self.last_text = message, message["text"]
        self._num_seen = len(messages)
        if self._newest is None or time.monotonic() - self._last_s < OBSERVE_EVERY_S:
            return
        newest, self._newest, self._last_s = self._newest, None, time.monotonic()
        self._context.log.info(newest["text"])
        losses = newest.get("loss"), newest.get("eval_loss")
        if losses != self._observed:
            self._observed = losses
            self._context.log_event(dg.AssetObservation(asset_key=self._key, metadata=progress_facts(newest)))


def describe_cancelled(task: Task[Any], relay: ProgressRelay | None) -> str:
    """How far a cancelled task was, and for a training where the next run resumes."""
    sentences = [CANCELLED]
    if relay is not None and relay.last_text:
        sentences.append(f"Stopped at: {relay.last_text}.")
    if isinstance(task, TrainTask):
        sentences.append(describe_resume(task.run_dir))
    return " ".join(sentences)


def progress_facts(message: Mapping[str, Any]) -> dict[str, Any]:
    """The newest progress as metadata: first what is read, then what is plotted over time."""
    facts = {name: value for name, value in message.items() if name not in ("text", "time_left_s", "elapsed_s")}
    done, total = facts.pop("done"), facts.pop("total")
    times = {name: message[f"{name}_s"] for name in ("time_left", "elapsed") if f"{name}_s" in message}
    return {
        "stage": facts.pop("stage"),
        "progress": f"{done} of {total} ({done / max(total, 1):.0%})",
        **{name: str(timedelta(seconds=round(value))) for name, value in times.items()},
        "num_done": done,
        **{name: rounded(value) if isinstance(value, float) else value for name, value in facts.items()},
    }
