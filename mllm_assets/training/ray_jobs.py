"""The same worker as a job of a Ray cluster, whose machines see the project's folder under the same path.

Request and result are files in a folder of the job below the project, as they are for a local worker. The job runs the
same supervisor, which ends everything when Ray stops the job, and when the launcher has written no heartbeat into that
folder for `SILENCE_S`: a launcher that was killed leaves no job behind that trains on.
"""

import json
import math
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_assets.errors import MachineError
from mllm_assets.training import supervisor
from mllm_assets.training.launch import POLL_S, WorkerCrashed, read_outcome, thread_variables, worker_command

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
BEAT_EVERY_S, SILENCE_S = 5.0, 60.0
STATUS_EVERY_S = 0.5
UNREACHABLE_S = 60.0  # a dashboard that is busy for so long counts as gone
PENDING_S = 3.0  # a job that is still waiting so long after it was told to stop waits for room
MAX_MESSAGE_CHARS = 2000
INSTALL = "pip install -c constraints.txt -e '.[ray]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Where jobs run and what each asks for.

    Attributes:
        address: Of the cluster's dashboard, or what `ray.init` takes. RAY_ADDRESS wins, as everywhere in Ray.
        jobs_dir: Where requests and results are exchanged: on every machine of the cluster the same folder.
        num_cpus: CPUs that a job reserves; the worker takes as many threads where `num_threads` says nothing.
        num_gpus: GPUs that a job reserves, and the only ones that it sees.
        python: The interpreter on the cluster's machines.
    """

    address: str = DEFAULT_ADDRESS
    jobs_dir: Path
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    python: str = sys.executable


def connect(address: str) -> "JobSubmissionClient":
    """Reach a cluster.

    Raises:
        MachineError: ray is not installed, or no cluster answers.
    """
    try:
        from ray.job_submission import JobSubmissionClient
    except ModuleNotFoundError:
        raise MachineError(
            f"The launcher ray needs the extra of that name, which is not installed: {INSTALL}"
        ) from None
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise MachineError(
            f"No Ray cluster answers at {address}: {reason} Start one with `ray start --head`, set RAY_ADDRESS to its "
            f"dashboard, or take MLLM_ASSETS_LAUNCHER=local."
        ) from None


@dataclass(kw_only=True)
class RayJob:
    """One worker task on the cluster, between `submitted` and its end."""

    client: "JobSubmissionClient"
    id: str
    folder: Path
    task: str
    outcome: dict[str, Any] | None = None
    is_pending: bool = True
    _looked_at_s: float = field(default=-math.inf)
    _beat_at_s: float = field(default=-math.inf)
    _unreachable_since_s: float | None = None

    def poll(self) -> bool:
        """Give a sign of life and look after the job; returns whether it has ended well, with its `outcome`.

        Raises:
            MllmAssetsError: What the worker found wrong, or the job was stopped by somebody else.
            WorkerCrashed: It ended otherwise, or the cluster is gone.
        """
        now_s = time.monotonic()
        if self.outcome is None and now_s - self._beat_at_s >= BEAT_EVERY_S:
            self._beat_at_s = now_s
            (self.folder / "heartbeat").write_text(str(now_s), encoding="utf-8")
        if self.outcome is None and now_s - self._looked_at_s >= STATUS_EVERY_S:
            self._looked_at_s = now_s
            if (info := self._info()) is not None:
                self._look_at(info)
        return self.outcome is not None

    def _info(self) -> Any:
        try:
            info = self.client.get_job_info(self.id)
        except (ConnectionError, OSError, RuntimeError) as error:  # the client's own, requests' and HTTP errors
            since_s = self._unreachable_since_s = self._unreachable_since_s or time.monotonic()
            if time.monotonic() - since_s > UNREACHABLE_S:
                raise WorkerCrashed(
                    f"The Ray cluster has not answered for {UNREACHABLE_S:g} s: {error} What was done is kept: run it "
                    f"again and it goes on.",
                    exit_code=None,
                    signal_number=None,
                ) from None
            return None
        self._unreachable_since_s = None
        return info

    def _look_at(self, info: Any) -> None:
        self.is_pending = info.status == "PENDING"
        if info.status == "STOPPED":
            raise MachineError(
                f"The Ray job {self.id} was stopped from outside Dagster. What was done is kept: run it again and it "
                f"goes on."
            )
        if info.status == "FAILED" and info.driver_exit_code is None and not self._result_path.exists():
            raise WorkerCrashed(
                f"Ray could not run the job {self.id}: {(info.message or '')[:MAX_MESSAGE_CHARS]}",
                exit_code=None,
                signal_number=None,
            )
        if info.status in ("FAILED", "SUCCEEDED"):
            self.outcome = read_outcome(self.task, int(info.driver_exit_code or 0), self._result_path)

    @property
    def _result_path(self) -> Path:
        return self.folder / "result.json"

    def stop(self, timeout_s: float) -> None:
        """Stop the job and wait until it has ended; a second interrupt does not cut the wait short.

        A job that waits for room has no process. Ray keeps it waiting, and heeds the stop as soon as it has room.

        Raises:
            MachineError: It has not ended in time. It will: nothing writes its heartbeat any more.
        """
        began_s, asked, interrupt, state = time.monotonic(), False, None, "out of reach"
        while time.monotonic() < began_s + timeout_s:
            try:
                if not asked:
                    self.client.stop_job(self.id)
                    asked = True
                status = self.client.get_job_status(self.id)
                if status.is_terminal() or status == "PENDING" and time.monotonic() > began_s + PENDING_S:
                    break
                state = str(status)
                time.sleep(POLL_S)
            except (ConnectionError, OSError, RuntimeError):
                state = "out of reach"
                time.sleep(POLL_S)
            except BaseException as error:  # e.g. a second Ctrl-C or Dagster's interrupt
                interrupt = error
        else:
            raise MachineError(
                f"The Ray job {self.id} was told to stop and is {state} after {timeout_s:g} s. It ends "
                f"{SILENCE_S:g} s after its last sign of life from here; `ray job status {self.id}` shows it."
            )
        if interrupt is not None:
            raise interrupt


@contextmanager
def submitted(
    client: "JobSubmissionClient",
    cluster: Cluster,
    request: Mapping[str, Any],
    *,
    env: Mapping[str, str],
    metadata: Mapping[str, str],
    grace_s: float,
) -> Iterator[RayJob]:
    """Submit one task; a job that has not ended by the end of the block is stopped, and its folder deleted.

    Args:
        client: From `connect`.
        cluster: Where and with what.
        request: As for `launch.run_worker`.
        env: Variables of the job on top of the cluster's own. Everybody who sees the dashboard sees them.
        metadata: What the dashboard shows of the job.
        grace_s: Seconds between SIGTERM and SIGKILL.
    """
    job_id = f"mllm-assets-{request['task']}-{uuid.uuid4().hex[:8]}"
    folder = cluster.jobs_dir.resolve() / job_id
    folder.mkdir(parents=True)
    try:
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        accelerator = request.get("accelerator") or {}
        job = RayJob(client=client, id=job_id, folder=folder, task=request["task"])
        client.submit_job(
            submission_id=job_id,
            entrypoint=f"exec {shlex.join(_command(cluster, accelerator, folder, grace_s))}",  # in the shell's place
            entrypoint_num_cpus=cluster.num_cpus,
            entrypoint_num_gpus=cluster.num_gpus,
            metadata=dict(metadata),
            runtime_env={"env_vars": {**_environment(accelerator, grace_s), **env}},
        )
        try:
            yield job
        finally:
            if job.outcome is None:
                job.stop(grace_s + 20)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _command(cluster: Cluster, accelerator: Mapping[str, Any], folder: Path, grace_s: float) -> Sequence[str]:
    worker = worker_command(accelerator, folder / "request.json", folder / "result.json", python=cluster.python)
    launcher = f"{SILENCE_S:g}:{folder / 'heartbeat'}"
    # by `env`, not among the job's variables: those are Ray's own supervisor's too, and what is marked gets killed
    mark = ["env", f"{supervisor.MARK}={folder.name}"]
    return [*mark, cluster.python, "-m", supervisor.__name__, f"{grace_s:g}", launcher, *worker]


def _environment(accelerator: Mapping[str, Any], grace_s: float) -> dict[str, str]:
    return {
        **thread_variables(accelerator),
        "RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(grace_s) + 2),  # 3 s otherwise, then SIGKILL to the supervisor too
        "TQDM_DISABLE": "1",  # a bar that shares its line with a message of Dagster Pipes would make it unreadable
    }


def wait_for(jobs: Sequence[RayJob], on_poll: Callable[[], None]) -> list[dict[str, Any]]:
    """Wait until every job has ended well, and return their results in order; the first that fails ends the wait."""
    while not all([job.poll() for job in jobs]):
        on_poll()
        time.sleep(POLL_S)
    return [job.outcome or {} for job in jobs]
