"""A wall clock that is set forward or back while a run is alive ends no run and deletes nothing that is in use."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import dagster as dg
import pytest

from mllm_assets.artifacts import write_manifest
from mllm_assets.components.slots import end_dead_runs
from tests.clock import STEPS_S, clock_set_by
from tests.integration.conftest import REPOSITORY, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.attack("clock")]

RUN = """import pathlib, sys, time
import dagster as dg
from mllm_assets.components.resources import ProjectResource

@dg.asset(pool="gpu")
def trained(project: ProjectResource) -> None:
    pathlib.Path("started").touch()
    while not pathlib.Path("enough").exists():
        time.sleep(0.1)

with dg.DagsterInstance.get() as instance:
    project = ProjectResource(root=".")
    assert dg.materialize([trained], instance=instance, resources={"project": project}).success
"""
LOOK = """import pathlib
from mllm_assets.cli import main
from mllm_assets.components.instance.doctor import _check_instance

assert main(["slots", "free"]) == 0
print([f.status for f in _check_instance(pathlib.Path.cwd()) if f.check == "slots"])
assert main(["gc", "--delete", "--older-than", "12h", "--keep-runs", "1"]) == 0
"""


def test_a_clock_that_is_set_ends_no_living_run_and_deletes_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the clock 60 s ahead `make demo` ended a run that was alive, and gave its GPU slot to the next."""
    shutil.copy(REPOSITORY / "dagster.yaml", tmp_path)
    raw = [tmp_path / "data" / ".raw" / "birds" / f"{number:016x}" for number in range(2)]
    for directory in raw:
        directory.mkdir(parents=True)
        write_manifest(directory, {})
    for name, value in {"DAGSTER_HOME": tmp_path, "MLLM_ASSETS_ROOT": tmp_path, "PYTHONPATH": REPOSITORY}.items():
        monkeypatch.setenv(name, str(value))
    run = subprocess.Popen([sys.executable, "-c", RUN], cwd=tmp_path, stderr=(tmp_path / "stderr").open("w"))
    try:
        wait_for(lambda: (tmp_path / "started").exists(), "the step")
        for step_s in STEPS_S:
            look = subprocess.run(
                [sys.executable, "-c", LOOK], cwd=tmp_path, env=clock_set_by(step_s), capture_output=True, text=True
            )
            assert look.returncode == 0, look.stderr
            assert "Nothing to free" in look.stdout and "['ok']" in look.stdout, f"{step_s} s: {look.stdout}"
            assert "is in progress, so data and caches stay" in look.stdout and all(path.is_dir() for path in raw)
        (tmp_path / "enough").touch()
        assert run.wait(300) == 0, (tmp_path / "stderr").read_text()
    finally:
        run.kill()
        run.wait()
    with dg.DagsterInstance.get() as instance:
        [ended] = instance.get_runs()
        assert ended.status == dg.DagsterRunStatus.SUCCESS


@pytest.mark.parametrize("change", ["started", "boot", None])
def test_a_dead_run_whose_pid_another_process_has_is_ended_by_what_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str | None
) -> None:
    """Pids come round, after a restart at once: a killed run stayed "started" while anything had its number."""
    from dagster._core.events import EngineEventData

    from mllm_assets.components.slots import PROCESSES
    from mllm_assets.process_id import ProcessId

    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    found = ProcessId.of(os.getpid())
    assert found is not None
    recorded = {**asdict(found), **({change: "another"} if change else {})}
    with dg.DagsterInstance.get() as instance:
        run = instance.create_run_for_job(dg.job(name="train")(lambda: None), status=dg.DagsterRunStatus.STARTED)
        metadata = {"pid": dg.MetadataValue.text(str(os.getpid()))}
        instance.report_engine_event("", run, EngineEventData(metadata))
        assert end_dead_runs(instance) == [], "who that pid was is not known, so it may be alive"
        instance.report_engine_event("", run, EngineEventData({PROCESSES: dg.MetadataValue.json([recorded])}))
        assert end_dead_runs(instance) == ([run.run_id] if change else [])


def test_a_killed_run_is_ended_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is certain must not become a doubt: the next run would wait for its slot for ever."""
    shutil.copy(REPOSITORY / "dagster.yaml", tmp_path)
    for name, value in {"DAGSTER_HOME": tmp_path, "MLLM_ASSETS_ROOT": tmp_path, "PYTHONPATH": REPOSITORY}.items():
        monkeypatch.setenv(name, str(value))
    run = subprocess.Popen([sys.executable, "-c", RUN], cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "started").exists(), "the step")
    run.kill()
    run.wait()
    time.sleep(0.1)
    look = subprocess.run(
        [sys.executable, "-c", "from mllm_assets.cli import main; main(['slots', 'free'])"],
        cwd=tmp_path, env=clock_set_by(-86400), capture_output=True, text=True,
    )  # fmt: skip
    assert "ended, its process is gone; its slots are free" in look.stdout, look.stderr
