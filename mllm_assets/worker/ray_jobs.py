"""The same worker as a job of a Ray cluster, whose machines see the project's folder under the same path.

Task and result are files in a folder of the job below the project, as they are for a local worker. The job runs the
same supervisor, which ends everything when Ray stops the job, and when the launcher has written no heartbeat into that
folder for `SILENCE_S`: a killed launcher leaves no job behind that continues to train.
"""

import json
import math
import os
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

from filelock import FileLock

from mllm_assets.errors import MachineError
from mllm_assets.settings import PLUGINS
from mllm_assets.worker import interrupts, supervisor
from mllm_assets.worker.launch import POLL_S, WorkerCrashed, read_outcome, thread_variables, worker_command
from mllm_assets.worker.tasks import Accelerator, Task, to_json

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
BEAT_EVERY_S, SILENCE_S = 5.0, 60.0
STATUS_EVERY_S = 0.5
UNREACHABLE_S = 60.0  # a dashboard that is silent for so long counts as gone
GROUP_START_S = 600.0  # a worker of Ray Train imports PyTorch first; 60 s otherwise
PENDING_S = 3.0  # a job that is still pending so long after the request to stop waits for room
MAX_MESSAGE_CHARS = 2000
INSTALL = "pip install -c constraints.txt -e '.[ray]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Where jobs run and what each reserves; the fields are described in `components.resources.RayCluster`."""

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
        raise MachineError(f"The launcher ray needs the extra ray, which is not installed: {INSTALL}") from None
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise MachineError(
            f"No Ray cluster answers at {address}: {reason} Start one with `ray start --head`, set RAY_ADDRESS to its "
            "dashboard, or set MLLM_ASSETS_LAUNCHER=local."
        ) from None


@dataclass(kw_only=True)
class RayJob:
    """One worker task on the cluster, between `submitted` and its end."""

    client: "JobSubmissionClient"
    id: str
    folder: Path
    task: Task[Any]
    outcome: Any = None  # its result
    is_pending: bool = True
    _checked_at_s: float = field(default=-math.inf)
    _heartbeat_at_s: float = field(default=-math.inf)
    _unreachable_since_s: float | None = None

    def submit(self, **options: Any) -> None:
        """Hand the job to the cluster: a dashboard under load closes connections, and may have taken the job then.

        Raises:
            MachineError: The cluster refuses it.
            WorkerCrashed: It does not answer.
        """
        began_s = time.monotonic()
        while True:
            try:
                self.client.submit_job(submission_id=self.id, **options)
                self._unreachable_since_s = None
                return
            except (ConnectionError, OSError, RuntimeError) as error:  # the client's own, requests' and HTTP errors
                if self._info() is not None:
                    return
                reason = (str(error).strip() or repr(error)).splitlines()[-1][:MAX_MESSAGE_CHARS]
                if isinstance(error, RuntimeError):
                    raise MachineError(f"Ray does not take the job {self.id}: {reason}") from None
                if time.monotonic() - began_s > UNREACHABLE_S:
                    raise WorkerCrashed(
                        f"The Ray cluster closes each connection with the job {self.id}: {reason} Nothing was "
                        "begun: run it again."
                    ) from None
                time.sleep(STATUS_EVERY_S)
                interrupts.raise_held()

    def poll(self) -> bool:
        """Write the heartbeat and check the job; return whether it has succeeded, with its `outcome`.

        Raises:
            MllmAssetsError: The worker's own error, or the job was stopped from outside.
            WorkerCrashed: It ended in another way, or the cluster is gone.
        """
        now_s = time.monotonic()
        if self.outcome is None and now_s - self._heartbeat_at_s >= BEAT_EVERY_S:
            self._heartbeat_at_s = now_s
            (self.folder / "heartbeat").write_text(str(now_s), encoding="utf-8")
        if self.outcome is None and now_s - self._checked_at_s >= STATUS_EVERY_S:
            self._checked_at_s = now_s
            if (info := self._info()) is not None:
                self._update(info)
        return self.outcome is not None

    def _info(self) -> Any:
        try:
            info = self.client.get_job_info(self.id)
        except (ConnectionError, OSError, RuntimeError) as error:  # the client's own, requests' and HTTP errors
            since_s = self._unreachable_since_s = self._unreachable_since_s or time.monotonic()
            if time.monotonic() - since_s > UNREACHABLE_S:
                raise WorkerCrashed(
                    f"The Ray cluster has not answered for {UNREACHABLE_S:g} s: {error} What was done is kept: run it "
                    "again and it goes on."
                ) from None
            return None
        self._unreachable_since_s = None
        return info

    def _update(self, info: Any) -> None:
        self.is_pending = info.status == "PENDING"
        if info.status == "STOPPED":
            raise MachineError(
                f"The Ray job {self.id} was stopped from outside Dagster. What was done is kept: run it again and it "
                "goes on."
            )
        result_path = self.folder / "result.json"
        if info.status == "FAILED" and info.driver_exit_code is None and not result_path.exists():
            raise WorkerCrashed(f"Ray could not run the job {self.id}: {(info.message or '')[:MAX_MESSAGE_CHARS]}")
        if info.status in ("FAILED", "SUCCEEDED"):
            self.outcome = read_outcome(self.task, int(info.driver_exit_code or 0), result_path, is_elsewhere=True)

    def stop(self, timeout_s: float) -> None:
        """Stop the job and wait until it has ended; a second interrupt does not cut the wait short.

        A pending job has no process. Ray keeps it pending, and stops it as soon as it would start.

        Raises:
            MachineError: It has not ended in time. It will end, since nothing writes its heartbeat any more.
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
                f"The Ray job {self.id} was asked to stop and is {state} after {timeout_s:g} s. It ends "
                f"{SILENCE_S:g} s after its last sign of life from here; `ray job status {self.id}` shows it."
            )
        if interrupt is not None:
            raise interrupt


@contextmanager
def submitted(
    client: "JobSubmissionClient",
    cluster: Cluster,
    task: Task[Any],
    *,
    env: Mapping[str, str],
    metadata: Mapping[str, str],
    grace_s: float,
) -> Iterator[RayJob]:
    """Submit one task; a job that has not ended by the end of the block is stopped, and its folder deleted.

    Everybody who sees the dashboard sees `metadata`, and `env`: variables on top of the cluster's own. `grace_s` are
    the seconds between SIGTERM and SIGKILL.
    """
    job_id = f"mllm-assets-{task.name}-{uuid.uuid4().hex[:8]}"
    folder = cluster.jobs_dir.resolve() / job_id
    folder.mkdir(parents=True)
    lock = FileLock(folder.with_suffix(".lock"))  # by which `mllm-assets gc` sees that the job has a launcher
    lock.acquire()
    try:
        (folder / "task.json").write_text(json.dumps(to_json(task)), encoding="utf-8")
        job = RayJob(client=client, id=job_id, folder=folder, task=task)
        job.submit(
            entrypoint=f"exec {shlex.join(_command(cluster, task, folder, grace_s))}",  # replaces the shell
            entrypoint_num_cpus=0 if is_spread(task) else cluster.num_cpus,  # its ranks reserve what they need
            entrypoint_num_gpus=0 if is_spread(task) else cluster.num_gpus,
            metadata=dict(metadata),
            runtime_env={"env_vars": {**_environment(task.accelerator, grace_s), **env}},
        )
        try:
            yield job
        finally:
            if job.outcome is None:
                job.stop(grace_s + 20)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def is_spread(task: Task[Any]) -> bool:
    """Whether a task runs in several processes that Ray Train starts."""
    return task.accelerator.num_processes > 1 and task.accelerator.spread_by == "ray"


def _command(cluster: Cluster, task: Task[Any], folder: Path, grace_s: float) -> Sequence[str]:
    task_path = folder / "task.json"
    worker = worker_command(task.accelerator, task_path, folder / "result.json", python=cluster.python)
    if is_spread(task):
        needs = [f"{number:g}" for number in (cluster.num_cpus, cluster.num_gpus, grace_s)]
        worker = [cluster.python, "-m", "mllm_assets.training.loop.ray_train", str(task_path), *needs]
    launcher = f"{SILENCE_S:g}:{folder / 'heartbeat'}"
    # by `env`, not among the job's variables: those are Ray's own supervisor's too, and what is marked gets killed
    mark = ["env", f"{supervisor.MARK}={folder.name}"]
    return [*mark, cluster.python, "-m", supervisor.__name__, f"{grace_s:g}", launcher, *worker]


def _environment(accelerator: Accelerator, grace_s: float) -> dict[str, str]:
    return {
        **thread_variables(accelerator),
        "RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(grace_s) + 2),  # 3 s otherwise, then SIGKILL to the supervisor too
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{GROUP_START_S:g}",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it tells what runs in Ray's own process, where nothing trains
        "TQDM_DISABLE": "1",  # a bar that shares its line with a message of Dagster Pipes would make it unreadable
        **({PLUGINS: os.environ[PLUGINS]} if os.environ.get(PLUGINS) else {}),
    }


def wait_for(jobs: Sequence[RayJob], on_poll: Callable[[], None]) -> list[Any]:
    """Wait until every job has succeeded, and return their results in order; the first that fails ends the wait."""
    while not all([job.poll() for job in jobs]):
        on_poll()
        time.sleep(POLL_S)
        interrupts.raise_held()
    return [job.outcome for job in jobs]
