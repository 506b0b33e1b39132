"""The worker as a job of a real Ray cluster of this machine, which the tests start and stop."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
import pyarrow.parquet as pq
import pytest

from mllm_assets.artifacts import read_manifest
from mllm_assets.components.resources import AcceleratorResource, RayAcceleratorResource, RayCluster
from mllm_assets.errors import MachineError, RecipeError
from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.evaluation.table import PREDICTIONS_FILE
from mllm_assets.file_digests import FileDigests
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches.features import FeatureStore, features_task
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import LOST_PEER, Reporter
from mllm_assets.worker.ray_jobs import Cluster, submitted
from mllm_assets.worker.tasks import BuildTask, FeaturesTask, Task
from tests.integration.conftest import Project, wait_for
from tests.interruption import losses, make_task, newest_logged_step
from tests.ports import free_port
from tests.processes import WORKER, command_line, descendants, kill, processes_of, those_that_run
from tests.worker_tasks import ONE_CPU_THREAD, evaluation

ray_jobs = pytest.importorskip("ray.job_submission", reason="the extra ray is not installed")

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

R = TypeVar("R")
# a node whose parts take longer than that to start, as next to other tests, ends itself
PATIENT = {
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_health_check_failure_threshold": "60",
    "RAY_health_check_period_ms": "1000",  # a node that was killed counts as gone after that many of them
    "RAY_worker_niceness": "0",  # 15 otherwise, with which they hardly run next to anything
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600",
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "600",  # else the dashboard ends after 30 s
}
SELECT = 'key:"twin/checkpoint"'


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A client of a cluster with its own ports and folder; `--block` ends its processes with the one started here."""
    folder = tempfile.mkdtemp(prefix="ray_")  # short: a socket's path has at most 107 characters
    port, dashboard, listen, grpc, client, metrics = (str(free_port()) for _ in range(6))
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--temp-dir", folder,
        "--node-ip-address", "127.0.0.1", "--port", port, "--dashboard-host", "127.0.0.1", "--dashboard-port",
        dashboard, "--dashboard-agent-listen-port", listen, "--dashboard-agent-grpc-port", grpc,
        "--ray-client-server-port", client, "--metrics-export-port", metrics, "--num-cpus", "2", "--num-gpus", "0",
        "--object-store-memory", "200000000", "--disable-usage-stats",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "OMP_NUM_THREADS")}
    environment |= PATIENT
    log = Path(folder, "start.log")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:

        def connected() -> Any:
            assert process.poll() is None, log.read_text()
            try:
                return ray_jobs.JobSubmissionClient(f"http://127.0.0.1:{dashboard}")
            except (ConnectionError, OSError, RuntimeError):
                return None

        found = wait_for(connected, "the cluster")
        found.gcs_address = f"127.0.0.1:{port}"
        yield found
    finally:
        if process.poll() is not None:
            print("The cluster ended by itself:", log.read_text()[-5000:])
        process.terminate()
        process.wait(300)
        shutil.rmtree(folder, ignore_errors=True)


class SecondNode:
    """Another machine of the cluster, with room for one rank; of one that is killed another takes the place."""

    def __init__(self, address: str, log: Path) -> None:
        self._address, self._log = address, log
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        names = ("dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "runtime-env-agent")
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", "--address", self._address,
            "--node-ip-address", "127.0.0.1", "--num-cpus", "2", "--num-gpus", "0", "--object-store-memory",
            "100000000", "--disable-usage-stats", *(f"--{name}-port={free_port()}" for name in names),
        ]  # fmt: skip
        with self._log.open("a") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **PATIENT})
        self._processes.append(process)

    def kill(self) -> None:
        """As a machine that is switched off: Ray's processes and the rank at once, so that nothing ends in order."""
        kill(descendants(self._processes[-1].pid))

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.terminate()
            process.wait(300)


@pytest.fixture
def on_ray(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The deployment's variables say that workers run on the cluster."""
    monkeypatch.setenv("MLLM_ASSETS_LAUNCHER", "ray")
    monkeypatch.setenv("RAY_ADDRESS", cluster.get_address())
    return cluster


def status_of(client: Any, task: str) -> list[str]:
    return [str(job.status) for job in client.list_jobs() if f"-{task}-" in (job.submission_id or "")]


def test_trained_on_ray_the_weights_are_those_of_the_local_launcher_and_a_cancelled_job_is_stopped(
    project: Project, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a job gets as many threads as it reserves CPUs
    project.write_recipe("twin", max_steps=6)
    project.made(SELECT)
    local = project.run_manifest("twin")

    client = request.getfixturevalue("on_ray")
    output = project.made(SELECT, {"ops": {"twin__checkpoint": {"config": {"force": True}}}})
    distant = project.run_manifest("twin")
    assert distant["fingerprint"] == f"{local['fingerprint']}-2"
    assert distant["weights_digest"] == local["weights_digest"]
    assert status_of(client, "train") == ["SUCCEEDED"]
    assert "memory: " in output, "what the worker says reaches Dagster"
    assert not list(project.layout.ray_jobs.iterdir())

    project.write_recipe("twin", max_steps=4000)
    command = project.materialize(SELECT, executor="multiprocess")

    def checkpoint() -> list[Path]:
        assert command.poll() is None, command.communicate()[0]
        return list((project.layout.outputs / "twin").glob("*/checkpoint-9"))

    wait_for(checkpoint, "step 9")
    assert those_that_run(WORKER, processes_of(project.root)), "the job's worker"
    command.send_signal(signal.SIGINT)
    output, _ = command.communicate(timeout=500)
    assert command.returncode != 0
    assert sorted(status_of(client, "train")) == ["STOPPED", "SUCCEEDED"], output
    wait_for(lambda: not processes_of(project.root), "all processes to end")
    assert list((project.layout.outputs / "twin").glob("*/checkpoint-9")), "what was done is kept"
    assert not list(project.layout.ray_jobs.iterdir())


def run_task(gpu: AcceleratorResource, wanted: Task[R]) -> R:
    """One worker task inside a Dagster run; returns what the asset's body got."""
    results = []

    @dg.asset(name="task")
    def task(context: dg.AssetExecutionContext, gpu: AcceleratorResource) -> dg.MaterializeResult:
        results.append(gpu.run(context, wanted))
        return dg.MaterializeResult()

    with dg.instance_for_test() as instance:
        dg.materialize([task], resources={"gpu": gpu}, instance=instance)
    return results[0]


def test_features_and_predictions_are_spread_over_the_cluster_and_are_the_same_bits(
    cluster: Any, parity_dir: Path, tmp_path: Path
) -> None:
    recipe = TrainSpec(
        model_name_or_path="model", dataset="gemma3_vlm_train", eval_dataset="gemma3_vlm_val", template="gemma3",
        do_train=True, finetuning_type="freeze",
    )  # fmt: skip
    model, data = parity_dir / "model", parity_dir / "data"
    settings = RayCluster(address=cluster.get_address(), num_workers=2, jobs_dir=str(tmp_path / "jobs"))
    there = RayAcceleratorResource(device="cpu", num_threads=1, ray=settings)

    features = FeaturesTask(
        recipe=recipe, model_dir=model, data_dir=data, features_root=tmp_path / "one", accelerator=ONE_CPU_THREAD
    )
    one = features_task(features, Reporter())
    spread = run_task(there, replace(features, features_root=tmp_path / "spread"))
    num_parts = spread.num_computed_by_worker
    assert len(num_parts) == 2 and all(num_parts) and sum(num_parts) == one.num_computed == one.num_images
    assert replace(spread, num_bytes=0, num_computed_by_worker=()) == replace(one, num_bytes=0)
    readers = [FeatureStore(tmp_path / name / one.directory, FileDigests()) for name in ("one", "spread")]
    images = sorted((parity_dir / "data" / "images").iterdir())[:20]
    assert all(readers[0].batch([image]).equal(readers[1].batch([image])) for image in images)

    folders = [tmp_path / "predictions" / name for name in ("one", "spread")]
    predictions = evaluation(model_dir=model, data_dir=data, directory=folders[0], max_new_tokens=4, batch_size=2)
    one = evaluate_task(predictions, Reporter()).manifest
    spread = run_task(there, replace(predictions, directory=folders[1])).manifest
    assert len(spread["num_answers_by_worker"]) == 2 and all(spread["num_answers_by_worker"])
    assert sum(spread["num_answers_by_worker"]) == one["num_predictions"]
    assert spread["digest"] == one["digest"]
    tables = [pq.read_table(folder / PREDICTIONS_FILE) for folder in folders]
    plain = [table.drop_columns(["latency_s"]) for table in tables]
    assert plain[0].equals(plain[1])
    assert status_of(cluster, "vision_features") == status_of(cluster, "evaluate") == ["SUCCEEDED"] * 3

    trains_the_tower = replace(recipe, freeze_vision_tower=False)
    with pytest.raises(RecipeError, match="freeze_vision_tower is false, so the tower trains and its output cannot be"):
        run_task(there, replace(features, recipe=trains_the_tower, features_root=tmp_path / "none"))


def test_a_job_without_room_is_left_at_once_and_does_nothing_when_it_gets_some(cluster: Any, tmp_path: Path) -> None:
    """Ray cannot stop what has not started."""
    too_much = Cluster(jobs_dir=tmp_path, num_cpus=64)
    with submitted(cluster, too_much, BuildTask(directory=tmp_path / "model"), env={}, metadata={}, grace_s=5) as job:
        assert not job.poll() and job.is_pending
    assert not list(tmp_path.iterdir())


def test_without_a_cluster_the_error_says_what_to_start(tmp_path: Path) -> None:
    cluster = RayCluster(address="http://127.0.0.1:9", jobs_dir=str(tmp_path))
    with pytest.raises(MachineError, match=r"No Ray cluster answers at http://127\.0\.0\.1:9: .* `ray start --head`"):
        run_task(RayAcceleratorResource(ray=cluster), BuildTask(directory=tmp_path / "model"))


def test_over_two_nodes_losses_are_those_of_one_process_and_what_a_killed_node_interrupts_resumes_to_the_same_bits(
    cluster: Any, parity_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = {"finetuning_type": "full", "max_steps": 24, "save_steps": 4, "eval_steps": 24}
    alone = make_task(parity_dir, tmp_path / "alone" / "run", **values, gradient_accumulation_steps=2)
    train_task(alone, Reporter())

    folder = tmp_path / "there"
    task = make_task(parity_dir, folder / "run", **values, gradient_accumulation_steps=1)
    settings = RayCluster(address=cluster.get_address(), num_cpus=2, num_train_workers=2, jobs_dir=str(folder / "jobs"))
    there = RayAcceleratorResource(device="cpu", num_threads=1, retry_delay_s=1, ray=settings)
    node = SecondNode(cluster.gcs_address, tmp_path / "node.log")
    before: dict[int, float] = {}

    def kill_and_replace() -> None:
        wait_for(lambda: newest_logged_step(task.run_dir, since_ns=0) >= 7, "step 7")
        node.kill()
        attempt = processes_of(folder)
        wait_for(lambda: not any(map(command_line, attempt)), "all processes of the attempt to end")
        before.update(losses(task.run_dir))
        assert not (task.run_dir / "manifest.json").exists(), "it finished before the kill"
        node.start()

    with node, ThreadPoolExecutor(1) as threads:
        killed = threads.submit(kill_and_replace)
        result = run_task(there, task)
        killed.result()
    assert LOST_PEER in capfd.readouterr().err
    assert result["resumed_from_step"] % 4 == 0
    after = losses(task.run_dir)
    assert before and {step: after[step] for step in before} == before, "those that were computed twice included"
    assert after == pytest.approx(losses(alone.run_dir), abs=1e-5, rel=0)
    assert result["reload"]["num_missing"] == result["reload"]["num_unexpected"] == 0
    assert read_manifest(task.run_dir / "checkpoint-24")["conditions"]["num_processes"] == 2
    assert not list(task.run_dir.glob(".*"))
