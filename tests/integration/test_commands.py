"""The commands of Dagster that the README and the issue name, run as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import REPOSITORY, Project, wait_for
from tests.integration.dagster_dev import Server, loaded_location, serving
from tests.processes import WORKER, descendants, processes_of, those_that_run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(2400)]


def run(*command: str, env: dict[str, str] | None = None) -> str:
    """Run a command in the repository and return what it printed."""
    environment = {**os.environ, **(env or {})}
    script = Path(sys.executable).with_name(command[0])
    done = subprocess.run(
        [script, *command[1:]], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_definitions_validate_accepts_the_code_location() -> None:
    assert "All code locations passed validation" in run("dagster", "definitions", "validate")


def test_dg_lists_the_components_that_a_user_configures() -> None:
    listed = run("dg", "list", "components", "--json")
    for name in ("FineTuning", "ImageTextDataset", "PretrainedModels"):
        assert f"mllm_assets.components.{name}" in listed


@pytest.mark.slow
def test_dg_launch_materialises_from_the_root(tmp_path: Path) -> None:
    run("dg", "launch", "--assets", 'key:"emoji/raw"', env={"MLLM_ASSETS_ROOT": str(tmp_path)})
    assert list((tmp_path / "data" / ".raw" / "emoji").glob("*/manifest.json"))


@pytest.fixture
def server(project: Project) -> Iterator[Server]:
    project.write_recipe("victim", max_steps=2000)
    with serving(project, "-m", f"{project.package}.definitions") as server:
        yield server


LAUNCH = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { id } } ... on PythonError { message } } }"""
TERMINATE = "mutation($id: String!) { terminateRun(runId: $id) { __typename } }"
STATUS = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
SLOTS = '{ instance { concurrencyLimit(concurrencyKey: "gpu") { claimedSlots { runId } } } }'


def test_cancelling_through_dagster_leaves_no_process_and_frees_the_gpu(project: Project, server: Server) -> None:
    """`PipesSubprocessClient` signals its direct child once and never kills: trainers were left on the GPU."""
    selector = {
        "repositoryLocationName": loaded_location(server),
        "repositoryName": "__repository__",
        "pipelineName": "__ASSET_JOB",
        "assetSelection": [{"path": ["victim", "checkpoint"]}],
    }
    launched = server.query(LAUNCH, params={"selector": selector, "runConfigData": {}, "mode": "default"})
    assert launched["launchRun"]["__typename"] == "LaunchRunSuccess", launched
    run_id = launched["launchRun"]["run"]["id"]
    logs = project.layout.outputs / "victim"
    wait_for(lambda: any(len(p.read_text().splitlines()) > 3 for p in logs.glob("*/trainer_log.jsonl")), "step 3")
    workers = those_that_run(WORKER, descendants(server.process.pid))
    assert workers
    assert server.query(SLOTS)["instance"]["concurrencyLimit"]["claimedSlots"] == [{"runId": run_id}]

    assert server.query(TERMINATE, id=run_id)["terminateRun"]["__typename"] == "TerminateRunSuccess"
    wait_for(lambda: server.query(STATUS, id=run_id)["runOrError"]["status"] == "CANCELED", "the run's end")
    wait_for(
        lambda: not those_that_run(WORKER, processes_of(project.root)),
        "the worker's end",
        30,
    )
    assert not [worker for worker in workers if worker.is_running()]
    wait_for(lambda: not server.query(SLOTS)["instance"]["concurrencyLimit"]["claimedSlots"], "the slot")
