"""What the systemd units start, started: three processes that find one another, and the checks of their health."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from mllm_assets.layout import Layout
from tests.integration.conftest import REPOSITORY, wait_for
from tests.integration.dagster_dev import Server, loaded_location
from tests.ports import free_port
from tests.processes import command_line, descendants, kill

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

LAUNCH = """mutation($location: String!, $repository: String!) { launchPipelineExecution(executionParams: {
  selector: {repositoryLocationName: $location, repositoryName: $repository, jobName: "__ASSET_JOB",
             assetSelection: [{path: ["emoji", "raw"]}]}, runConfigData: {}}) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
STATUS = "query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"


class Machine:
    """The units of deploy/systemd on this machine: other folders and ports, the same commands and variables."""

    def __init__(self, folder: Path) -> None:
        self.state, self.code_port, self.ui_port = folder / "state", str(free_port()), str(free_port())
        (self.state / "dagster_home").mkdir(parents=True)
        shutil.copy(REPOSITORY / "dagster.yaml", self.state / "dagster_home")
        self.workspace = folder / "workspace.yaml"
        text = (REPOSITORY / "deploy" / "workspace.yaml").read_text()
        self.workspace.write_text(text.replace("4000", self.code_port))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def unit(self, name: str) -> tuple[dict[str, str], list[list[str]]]:
        text = (REPOSITORY / "deploy" / "systemd" / f"mllm-assets-{name}.service").read_text()
        for written, here in (
            ("/opt/mllm-assets/.venv", sys.prefix),
            ("/opt/mllm-assets", str(REPOSITORY)),
            ("/var/lib/mllm-assets", str(self.state)),
            ("deploy/workspace.yaml", str(self.workspace)),
            ("4000", self.code_port),
            ("3000", self.ui_port),
        ):
            text = text.replace(written, here)
        settings = [line.partition("=") for line in text.splitlines() if not line.startswith("#")]
        environment = dict(value.split("=", 1) for key, _, value in settings if key == "Environment")
        return environment, [shlex.split(value) for key, _, value in settings if key == "ExecStart"]

    def start(self, name: str) -> None:
        environment, [command] = self.unit(name)
        self.processes[name] = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**environment, "PYTHONPATH": str(REPOSITORY), "HOME": os.environ.get("HOME", "/")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def failing_checks(self) -> list[str]:
        environment, commands = self.unit("health")
        environment["PYTHONPATH"] = str(REPOSITORY)
        return [
            shlex.join(command)
            for command in commands
            if subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, check=False).returncode
        ]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    for process in machine.processes.values():
        kill(descendants(process.pid))
        process.kill()
        process.wait()


def test_the_units_run_an_asset_listen_on_loopback_and_end_when_asked(machine: Machine) -> None:
    assert len(machine.failing_checks()) == 3, "the checks of health pass where nothing runs"
    for name in ("code", "daemon", "webserver"):
        machine.start(name)
    server = Server(machine.processes["webserver"], int(machine.ui_port))
    wait_for(server.is_up, "the webserver")
    assert loaded_location(server) == "mllm_assets"
    assert wait_for(lambda: not machine.failing_checks(), "all checks of health")

    launched = server.query(LAUNCH, location="mllm_assets", repository="__repository__")["launchPipelineExecution"]
    run_id = launched["run"]["runId"]

    def ended() -> str | None:
        status = server.query(STATUS, id=run_id)["runOrError"]["status"]
        return status if status in ("SUCCESS", "FAILURE", "CANCELED") else None

    assert wait_for(ended, "the run") == "SUCCESS"
    assert list(Layout(machine.state).root.glob("data/.raw/emoji*"))

    for process in machine.processes.values():
        for tree in [psutil.Process(process.pid), *descendants(process.pid)]:
            for connection in tree.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    address = connection.laddr.ip.removeprefix("::ffff:")  # gRPC listens on mapped addresses
                    assert ip_address(address).is_loopback, (command_line(tree), connection.laddr)

    children = [child for process in machine.processes.values() for child in descendants(process.pid)]
    for name in ("webserver", "daemon", "code"):
        machine.processes[name].send_signal(signal.SIGTERM)  # as systemd stops a unit
    started = time.monotonic()
    for process in machine.processes.values():
        process.wait(300)
    assert time.monotonic() - started < 60
    wait_for(lambda: not any(child.is_running() for child in children), "the children of the units to end")


def test_dagster_dev_reads_the_workspace_file(tmp_path: Path) -> None:
    """`working_directory: .` is relative to the current directory, and `pyproject.toml` wins unless -w is given."""
    home = tmp_path / "dagster_home"
    home.mkdir()
    shutil.copy(REPOSITORY / "dagster.yaml", home)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "dagster", "dev", "-h", "127.0.0.1", "-p", str(port), "-w", "workspace.yaml"],
        cwd=REPOSITORY,
        env={**os.environ, "DAGSTER_HOME": str(home), "MLLM_ASSETS_ROOT": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        server = Server(process, port)
        wait_for(server.is_up, "dagster dev")
        assert loaded_location(server) == "mllm_assets"
    finally:
        kill(descendants(process.pid))
        process.kill()
        process.wait()
