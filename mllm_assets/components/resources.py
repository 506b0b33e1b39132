"""The two resources that the assets use: where things lie, and what runs the model."""

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from mllm_assets.errors import MllmAssetsError
from mllm_assets.layout import Layout
from mllm_assets.quality.store import QualityStore, table_for, utc_now
from mllm_assets.training.launch import WorkerCrashed, run_worker

OBSERVE_EVERY_S = 5.0  # an observation is a database row, so progress is throttled


@contextmanager
def failures_for_people() -> Iterator[None]:
    """Turn our errors into step failures that show the message alone and are not retried."""
    try:
        yield
    except MllmAssetsError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from None


class ProjectResource(dg.ConfigurableResource):
    """The folders of the project and its quality database."""

    root: str = Field(description="Folder that holds data/, pretrains/, outputs/, releases/ and cache/.")

    @property
    def layout(self) -> Layout:
        return Layout(Path(self.root).resolve())

    @property
    def quality_store(self) -> QualityStore:
        return QualityStore(self.layout.quality_db)

    def recorded(self, context: dg.AssetExecutionContext, result: dg.MaterializeResult) -> dg.MaterializeResult:
        """Write a materialisation into the table `runs` of DuckDB, with its plain metadata, and hand it on."""
        key = dg.AssetKey.from_coercible(result.asset_key) if result.asset_key else context.asset_key
        plain = {name: value for name, value in (result.metadata or {}).items() if isinstance(value, str | int | float)}
        row = {
            "run_id": context.run.run_id,
            "asset": key.to_user_string(),
            "digest": result.data_version.value if result.data_version else None,
            "created_at": utc_now(),
            "metadata": json.dumps(plain),
        }
        with failures_for_people():
            self.quality_store.write({"runs": table_for("runs", [row])})
        return result


class AcceleratorResource(dg.ConfigurableResource):
    """The device that models run on. Each call runs in a process tree of its own, which ends with the step."""

    device: Literal["auto", "cuda", "mps", "cpu"] = Field(
        default="auto", description="auto takes CUDA, then MPS, then the CPU; a named device must be there."
    )
    num_processes: int = Field(default=1, ge=1, description="Processes on this machine; above 1 torchrun starts them.")
    num_threads: int | None = Field(default=None, description="CPU threads of each process; by default one per core.")
    grace_s: float = Field(
        default=10.0, description="Seconds between asking a cancelled worker to stop and killing it."
    )

    def run(self, context: dg.AssetExecutionContext, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run one worker task, with its progress as observations of the step's assets.

        Raises:
            dg.Failure: The task failed. A crash may be retried; a mistake in the input or a cancellation may not.
        """
        key = next(iter(context.selected_asset_keys))
        with _pipes_session(context) as session:
            progress = _ProgressRelay(context, key, session)
            try:
                with failures_for_people():
                    return run_worker(
                        {**request, "accelerator": self.settings(request["task"])},
                        env=session.get_bootstrap_env_vars(),
                        on_poll=progress.relay,
                        grace_s=self.grace_s,
                    )
            except dg.DagsterExecutionInterruptedError:
                # a RetryPolicy would start a bare interrupt again
                raise dg.Failure(
                    description="Cancelled; every process of the step has ended.", allow_retries=False
                ) from None
            except WorkerCrashed as crash:
                raise dg.Failure(description=str(crash), allow_retries=True) from None

    def settings(self, task: str) -> dict[str, Any]:
        """What the worker is told; only training is spread over processes."""
        num_processes = self.num_processes if task == "train" else 1
        return {"device": self.device, "num_processes": num_processes, "num_threads": self.num_threads}


@contextmanager
def _pipes_session(context: dg.AssetExecutionContext) -> Iterator[dg.PipesSession]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)  # Dagster warns of a method that it calls itself
        with dg.open_pipes_session(
            context=context,
            context_injector=dg.PipesTempFileContextInjector(),
            message_reader=dg.PipesTempFileMessageReader(),
        ) as session:
            yield session


class _ProgressRelay:
    """Pass every warning on, and the newest progress as a line and an observation, at most one every few seconds."""

    def __init__(self, context: dg.AssetExecutionContext, key: dg.AssetKey, session: dg.PipesSession):
        self._context, self._key, self._session = context, key, session
        self._num_seen, self._last_s, self._parent = 0, time.monotonic(), os.getppid()
        self._newest: Mapping[str, Any] | None = None

    def relay(self) -> None:
        if os.getppid() != self._parent:  # kill -9 of the run worker leaves this step worker alive
            raise dg.Failure(description="The run's process is gone, so this step ends too.", allow_retries=False)
        messages = self._session.get_custom_messages()
        for message in messages[self._num_seen :]:
            if "warning" in message:  # each is said once, and would be lost among the progress
                self._context.log.warning(message["warning"])
            elif "stage" not in message:
                self._context.log.info(message["text"])
            else:
                self._newest = message
        self._num_seen = len(messages)
        if self._newest is None or time.monotonic() - self._last_s < OBSERVE_EVERY_S:
            return
        facts, self._newest, self._last_s = dict(self._newest), None, time.monotonic()
        self._context.log.info(facts.pop("text"))
        self._context.log_event(dg.AssetObservation(asset_key=self._key, metadata=facts))
