"""Killed at any instant and materialised again, a run ends with the weights of one that was never interrupted."""

import random
import re
import signal
import subprocess
from pathlib import Path

import dagster as dg
import psutil
import pytest

from mllm_assets.components.slots import end_dead_runs
from tests.integration.conftest import Project, wait_for
from tests.processes import WORKER, command_line, descendants, processes_of, those_that_run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200), pytest.mark.attack("kill -9")]

SELECT = 'key:"victim/checkpoint"'


def num_steps_logged(project: Project) -> int:
    logs = list((project.layout.outputs / "victim").glob("*/trainer_log.jsonl"))
    return len(logs[0].read_text().splitlines()) if logs else 0


def find(victim: str, command: subprocess.Popen[str]) -> psutil.Process:
    """The trainer, the step worker that launched it, or the process of the whole run."""
    tree = descendants(command.pid)
    supervisor, loader, trainer = [p for p in tree if command_line(p)[-2:] == [WORKER, "--fork"]]
    assert (loader.ppid(), trainer.ppid()) == (supervisor.pid, loader.pid)
    step_worker = supervisor.parent()
    assert step_worker is not None and step_worker.pid != command.pid
    return {"trainer": trainer, "step worker": step_worker, "run": psutil.Process(command.pid)}[victim]


def find_trainer(command: subprocess.Popen[str]) -> psutil.Process:
    """The process that trains below a command, as soon as it is there."""

    def find() -> psutil.Process | None:
        workers = those_that_run(WORKER, descendants(command.pid))
        return next((p for p in workers if "supervisor" not in " ".join(command_line(p))), None)

    return wait_for(find, "the trainer")


@pytest.mark.slow
def test_kill_9_of_trainer_step_worker_or_run_changes_no_bit_of_the_weights(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own resume silently drops the weights of Gemma 3."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the bits of a sum depend on how many threads share it
    project.write_recipe("victim")
    rng = random.Random(20260801)
    for victim in ("trainer", "step worker", "run"):
        step = num_steps_logged(project) + rng.randint(2, 7)
        no_retry = {"resources": {"gpu": {"config": {"max_retries": 0}}}}
        command = project.materialize(SELECT, no_retry, executor="multiprocess")
        wait_for(lambda step=step: num_steps_logged(project) >= step, f"step {step}")
        find(victim, command).send_signal(signal.SIGKILL)
        command.communicate(timeout=500)
        wait_for(lambda: not processes_of(project.root), "all processes to end")
        assert not list((project.layout.outputs / "victim").glob("*/manifest.json")), "it finished before the kill"
        end_killed_runs(project)
    project.made(SELECT)
    resumed = project.run_manifest("victim")
    assert resumed["resumed_from_step"] > 0

    project.made(SELECT, {"ops": {"victim__checkpoint": {"config": {"force": True}}}})
    whole = project.run_manifest("victim")
    assert whole["fingerprint"] == f"{resumed['fingerprint']}-2"
    assert whole["resumed_from_step"] is None
    assert whole["weights_digest"] == resumed["weights_digest"]
    assert weights(project, whole["fingerprint"]) == weights(project, resumed["fingerprint"])


def end_killed_runs(project: Project) -> None:
    import dagster as dg

    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        end_dead_runs(instance)


def weights(project: Project, fingerprint: str) -> bytes:
    path: Path = project.layout.outputs / "victim" / fingerprint / "model" / "model.safetensors"
    return path.read_bytes()


def test_ctrl_c_leaves_no_process_and_keeps_what_was_done(project: Project) -> None:
    project.write_recipe("victim", max_steps=2000)
    command = project.materialize(SELECT, executor="multiprocess")
    wait_for(lambda: num_steps_logged(project) >= 7, "step 7")
    assert those_that_run(WORKER, descendants(command.pid))
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=500)
    assert command.returncode != 0
    wait_for(lambda: not processes_of(project.root), "all processes to end")
    assert list((project.layout.outputs / "victim").glob("*/checkpoint-6"))
    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        [run] = instance.get_runs(limit=1)
        failures = [
            entry.dagster_event.step_failure_data.user_failure_data.description
            for entry in instance.all_logs(run.run_id, dg.DagsterEventType.STEP_FAILURE)
        ]
    [said] = failures
    assert re.search(r"Stopped at: train \d+/2000.*the run resumes from checkpoint-\d+", said), said
