"""Worker tasks on a Ray cluster, with dagster-ray's reader of Pipes messages in the job's log."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import dagster as dg
from dagster._core.errors import DagsterPipesExecutionError

from mllm_assets.components.progress import ProgressRelay, open_session
from mllm_assets.errors import MachineError
from mllm_assets.worker.ray_jobs import INSTALL, Cluster, RayJob, connect, submitted, wait_for
from mllm_assets.worker.tasks import Task

WARN_PENDING_AFTER_S = 20.0
R = TypeVar("R")


def run_on_ray(
    context: dg.AssetExecutionContext,
    key: dg.AssetKey,
    tasks: Sequence[Task[R]],
    cluster: Cluster,
    *,
    grace_s: float,
) -> list[R]:
    """Run one job for each task, in parallel as far as the cluster has room, and return their results in order.

    `PipesRayJobClient.run` is not used: it shows no progress while it waits, raises a job's failure as a bare
    `RuntimeError`, and after a cancellation does not wait until the job has ended.

    Raises:
        MllmAssetsError: A worker's own error; no cluster answers; the extra `ray` is not installed.
        WorkerCrashed: A job ended in another way. The other jobs are stopped.
    """
    client = connect(cluster.address)
    new_reader = _message_reader()
    from dagster_ray.core.pipes import PIPES_LAUNCHED_EXTRAS_RAY_ADDRESS_KEY, PIPES_LAUNCHED_EXTRAS_RAY_JOB_ID_KEY

    metadata = {"dagster/run_id": context.run.run_id, "dagster/asset": key.to_user_string()}
    jobs: list[RayJob] = []
    relays: list[ProgressRelay] = []
    with ExitStack() as stack:
        for task in tasks:
            reader = new_reader()
            session = stack.enter_context(open_session(context, dg.PipesEnvContextInjector(), reader))
            env = session.get_bootstrap_env_vars()
            job = stack.enter_context(submitted(client, cluster, task, env=env, metadata=metadata, grace_s=grace_s))
            address = client.get_address()
            extras = {PIPES_LAUNCHED_EXTRAS_RAY_JOB_ID_KEY: job.id, PIPES_LAUNCHED_EXTRAS_RAY_ADDRESS_KEY: address}
            session.report_launched({"extras": extras})
            context.log.info(f"Ray job {job.id} is submitted to {address}.")
            jobs.append(job)
            relays.append(ProgressRelay(context, key, session))

        warn_at_s, warned = time.monotonic() + WARN_PENDING_AFTER_S, set()

        def on_poll() -> None:
            for relay in relays:
                relay.relay()
            for job in jobs if time.monotonic() > warn_at_s else ():
                if job.is_pending and job.id not in warned:
                    warned.add(job.id)
                    needed = f"{cluster.num_cpus:g} CPUs and {cluster.num_gpus:g} GPUs"
                    context.log.warning(f"Ray job {job.id} waits until the cluster has {needed} for it.")

        return wait_for(jobs, on_poll)


def _message_reader() -> type[Any]:
    """dagster-ray's reader of a job's log."""
    try:
        from dagster_ray import PipesRayJobMessageReader
    except ModuleNotFoundError:
        raise MachineError(f"The launcher ray needs dagster-ray, which is not installed: {INSTALL}") from None

    class RayMessageReader(PipesRayJobMessageReader):
        """A log without an end, as of a job that never started, does not fail the step: results come another way."""

        def terminate(self, handler: dg.PipesMessageHandler) -> None:
            try:
                super().terminate(handler)
            except DagsterPipesExecutionError:
                handler._context.log.warning("The end of the Ray job's log was not read.")

    return RayMessageReader
