"""The two resources that the assets use: the project's folders, and the accelerator that runs the model."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import dagster as dg
from pydantic import Field

from mllm_assets.components.progress import ProgressRelay, describe_cancelled, open_session
from mllm_assets.components.ray_launcher import run_on_ray
from mllm_assets.components.slots import record_processes, tag_host
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.layout import Layout
from mllm_assets.store.mirror import Mirror
from mllm_assets.store.objects import Store
from mllm_assets.worker import interrupts
from mllm_assets.worker.launch import WorkerCrashed, load_ahead, run_worker
from mllm_assets.worker.ray_jobs import DEFAULT_ADDRESS, Cluster
from mllm_assets.worker.tasks import Accelerator, EvaluateTask, Part, SharedTask, Task, TrainTask

R = TypeVar("R")
_makes_all: ContextVar[bool] = ContextVar("makes_all", default=False)


@contextmanager
def all_in_this_process() -> Iterator[None]:
    """Say that this process does all steps of the run that it executes."""
    token = _makes_all.set(True)
    try:
        yield
    finally:
        _makes_all.reset(token)


def as_set(resource: dg.ConfigurableResource) -> dg.ResourceDefinition:
    """The resource as it is set: a run's configuration may change its settings, but the launchpad does not list them.

    It lists every field that has a default, below the values of the recipe, which are what a run is about.
    """
    kind = type(resource)
    fields = kind.to_config_schema().as_field().config_type.fields  # pyright: ignore[reportAttributeAccessIssue]

    def create(context: dg.InitResourceContext) -> dg.ConfigurableResource:
        made = kind(**{**resource.model_dump(), **context.resource_config})
        made.setup_for_execution(context)
        return made

    return dg.ResourceDefinition(
        create,
        config_schema={
            name: dg.Field(field.config_type, is_required=False, description=field.description)
            for name, field in fields.items()
        },
        description=kind.__doc__,
    )


class ProjectResource(dg.ConfigurableResource):
    """The folders of the project and its quality database."""

    root: str = Field(description="Folder that holds data/, pretrains/, outputs/, releases/ and cache/.")
    store: str = Field(
        default="",
        description="Mirrors artefacts for other machines: s3://, gs:// or abfs://bucket/prefix, or file:///folder.",
    )
    price_per_hour: float = Field(
        default=0.0, ge=0, description="What this machine costs an hour; each asset's metadata then says its share."
    )

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Record which process executes a step: every asset of ours takes this resource."""
        if context.instance is not None and context.run is not None:
            record_processes(context.instance, context.run)

    @property
    def layout(self) -> Layout:
        return Layout(Path(self.root).resolve())

    @property
    def quality_store(self) -> QualityStore:
        return QualityStore(self.layout.quality_db)

    def mirror(self, context: dg.AssetExecutionContext | dg.OpExecutionContext) -> Mirror | None:
        """The mirror of the artefact store, if one is set."""
        layout = self.layout
        return Mirror(Store(self.store, layout.root), layout, context.log.info) if self.store else None


class RayCluster(dg.Config):
    """The Ray cluster of `MLLM_ASSETS_LAUNCHER=ray`. Its machines have the project's folder under the same path."""

    address: str = Field(
        default=DEFAULT_ADDRESS, description="The cluster's dashboard. The variable RAY_ADDRESS overrides it."
    )
    num_cpus: float = Field(default=1.0, ge=0, description="CPUs that each job reserves, and threads of its worker.")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs that each job reserves, and the only ones it sees.")
    num_workers: int = Field(
        default=1, ge=1, description="Number of jobs that share feature extraction and predictions."
    )
    num_train_workers: int = Field(
        default=1,
        ge=1,
        description="Processes over which Ray Train spreads a training, on as many machines as there are; each has the "
        "CPUs and GPUs of a job.",
    )
    jobs_dir: str = Field(default="cache/ray_jobs", description="Folder for tasks and results, shared by all machines.")
    python: str = Field(default=sys.executable, description="The Python of the cluster's machines.")


class AcceleratorResource(dg.ConfigurableResource):
    """The device that models run on. Each call runs in its own process tree, which ends with the step."""

    device: Literal["auto", "cuda", "mps", "cpu"] = Field(
        default="auto", description="auto takes CUDA, then MPS, then the CPU; a named device must be available."
    )
    num_processes: int = Field(default=1, ge=1, description="Processes on one machine; above 1 torchrun starts them.")
    num_threads: int | None = Field(default=None, description="CPU threads of each process; by default one per core.")
    grace_s: float = Field(
        default=10.0, description="Seconds between asking a cancelled worker to stop and killing it."
    )
    max_retries: int = Field(
        default=2,
        ge=0,
        description="How often a step is restarted, and resumes, after its worker was killed or its machine was lost. "
        "A mistake in recipe, data or settings is never retried.",
    )
    retry_delay_s: float = Field(default=10.0, ge=0, description="Seconds before the restart.")

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Let a worker's libraries load while the assets are made that need none: 4 s of CPU time."""
        if _makes_all.get() and not isinstance(self, RayAcceleratorResource):
            accelerator = Accelerator(num_processes=self.num_processes, num_threads=self.num_threads)
            load_ahead(accelerator, (TrainTask.entry, EvaluateTask.entry), grace_s=self.grace_s)

    def run(self, context: dg.AssetExecutionContext, task: Task[R], on_poll: Callable[[], None] | None = None) -> R:
        """Run one worker task, with its progress as observations of the step's assets.

        `on_poll` is called while it is waited for; what it raises ends the task. On a Ray cluster nothing calls it.

        Raises:
            MllmAssetsError: What the worker found wrong.
            dg.Failure: The task was cancelled, or has a defect; neither is retried.
            dg.RetryRequested: The worker was killed, or its machine is lost.
        """
        tag_host(context.instance, context.run_id)
        key = next(iter(context.selected_asset_keys))
        task = replace(task, accelerator=self.accelerator(task))
        relay: ProgressRelay | None = None
        try:
            if isinstance(self, RayAcceleratorResource):
                with interrupts.held_back():
                    return self.run_on_ray(context, key, task)
            ends = dg.PipesTempFileContextInjector(), dg.PipesTempFileMessageReader()
            with open_session(context, *ends) as session:
                relay = ProgressRelay(context, key, session)
                polls = [relay.relay, *([on_poll] if on_poll else [])]

                def poll() -> None:
                    for one in polls:
                        one()

                return run_worker(task, env=session.get_bootstrap_env_vars(), on_poll=poll, grace_s=self.grace_s)
        except dg.DagsterExecutionInterruptedError:
            # a RetryPolicy would retry a bare interrupt
            raise dg.Failure(description=describe_cancelled(task, relay), allow_retries=False) from None
        except WorkerCrashed as crash:
            failure = dg.Failure(description=str(crash), allow_retries=False)
            if not crash.is_transient:
                raise failure from None
            context.log.warning(str(crash))  # Dagster's own log does not show a retry's cause
            raise dg.RetryRequested(self.max_retries, self.retry_delay_s) from failure

    @property
    def num_training_processes(self) -> int:
        """Over how many processes a training is spread; they multiply its batch."""
        return self.num_processes

    @property
    def may_lose_machines(self) -> bool:
        """Whether a run may have to go on elsewhere, so that its checkpoints belong into the artefact store."""
        return False

    def accelerator(self, task: Task[Any]) -> Accelerator:
        """Where a task computes; only training is spread over processes."""
        num_processes = self.num_training_processes if isinstance(task, TrainTask) else 1
        return Accelerator(device=self.device, num_processes=num_processes, num_threads=self.num_threads)


class RayAcceleratorResource(AcceleratorResource):
    """The same as jobs of a Ray cluster; a class of its own, so that the launchpad shows Ray's settings only here."""

    ray: RayCluster = Field(default_factory=RayCluster, description="The cluster, and what a job takes of it.")

    @property
    def num_training_processes(self) -> int:
        return self.ray.num_train_workers if self.ray.num_train_workers > 1 else self.num_processes

    @property
    def may_lose_machines(self) -> bool:
        return True

    def accelerator(self, task: Task[Any]) -> Accelerator:
        """Where a task computes; training is spread by Ray Train where it has several workers."""
        return replace(super().accelerator(task), spread_by="ray" if self.ray.num_train_workers > 1 else "torchrun")

    def run_on_ray(self, context: dg.AssetExecutionContext, key: dg.AssetKey, task: Task[R]) -> R:
        """Run a task as a job, or as several where it can be shared."""
        values = self.ray.model_dump(exclude={"num_workers", "num_train_workers"})
        cluster = Cluster(**{**values, "jobs_dir": Path(self.ray.jobs_dir)})
        num_workers = self.ray.num_workers if isinstance(task, SharedTask) else 1
        if num_workers > 1:
            parts = [replace(task, part=Part(index=index, count=num_workers)) for index in range(num_workers)]
            task = replace(task, parts=tuple(run_on_ray(context, key, parts, cluster, grace_s=self.grace_s)))
        [result] = run_on_ray(context, key, [task], cluster, grace_s=self.grace_s)
        return result
