"""Worker tasks on a Ray cluster, with dagster-ray's reader of Pipes messages in the job's log."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import dagster as dg

from mllm_assets.components.progress import ProgressRelay, open_session
from mllm_assets.errors import MachineError
from mllm_assets.training.ray_jobs import INSTALL, Cluster, RayJob, connect, submitted, wait_for

SAY_PENDING_AFTER_S = 20.0


def run_on_ray(
    context: dg.AssetExecutionContext,
    key: dg.AssetKey,
    requests: Sequence[Mapping[str, Any]],
    cluster: Cluster,
    *,
    grace_s: float,
) -> list[dict[str, Any]]:
    """Run one job for each request, all at once as far as the cluster has room, and return their results in order.

    `PipesRayJobClient.run` is not used: it shows no progress while it waits, raises a job's failure as a bare
    `RuntimeError`, and after a cancellation does not wait until the job has ended.

    Raises:
        MllmAssetsError: What a worker found wrong; no cluster answers; the extra `ray` is not installed.
        WorkerCrashed: A job ended otherwise. The others are stopped.
    """
    client = connect(cluster.address)
    try:
        from dagster_ray.core.pipes import PIPES_LAUNCHED_EXTRAS_RAY_ADDRESS_KEY, PIPES_LAUNCHED_EXTRAS_RAY_JOB_ID_KEY

        from mllm_assets.components.ray_messages import RayMessageReader
    except ModuleNotFoundError:
        raise MachineError(f"The launcher ray needs dagster-ray, which is not installed: {INSTALL}") from None
    metadata = {"dagster/run_id": context.run.run_id, "dagster/asset": key.to_user_string()}
    jobs: list[RayJob] = []
    relays: list[ProgressRelay] = []
    with ExitStack() as stack:
        for request in requests:
            reader = RayMessageReader()
            session = stack.enter_context(open_session(context, dg.PipesEnvContextInjector(), reader))
            env = session.get_bootstrap_env_vars()
            job = stack.enter_context(submitted(client, cluster, request, env=env, metadata=metadata, grace_s=grace_s))
            session.report_launched(
                {
                    "extras": {
                        PIPES_LAUNCHED_EXTRAS_RAY_JOB_ID_KEY: job.id,
                        PIPES_LAUNCHED_EXTRAS_RAY_ADDRESS_KEY: client.get_address(),
                    }
                }
            )
            context.log.info(f"Ray job {job.id} is submitted to {client.get_address()}.")
            jobs.append(job)
            relays.append(ProgressRelay(context, key, session))

        waits, said = time.monotonic() + SAY_PENDING_AFTER_S, set()

        def on_poll() -> None:
            for relay in relays:
                relay.relay()
            for job in jobs if time.monotonic() > waits else ():
                if job.is_pending and job.id not in said:
                    said.add(job.id)
                    asked = f"{cluster.num_cpus:g} CPUs and {cluster.num_gpus:g} GPUs"
                    context.log.warning(f"Ray job {job.id} waits until the cluster has {asked} for it.")

        return wait_for(jobs, on_poll)
