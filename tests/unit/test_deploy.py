"""The files of deploy/, each through what reads it: systemd, the compose specification's schema, Dagster's own CLI."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from dagster._cli import cli as dagster_cli
from dagster._core.workspace.load import location_origins_from_yaml_paths
from dagster._daemon.cli import create_dagster_daemon_cli
from dagster_webserver.cli import dagster_webserver

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
COMMANDS: dict[str, click.Command] = {
    "dagster": dagster_cli,
    "dagster-daemon": create_dagster_daemon_cli(),
    "dagster-webserver": dagster_webserver,
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def parse(command: list[str]) -> dict[str, Any]:
    """The options of a Dagster command, as its own parser understands them."""
    parser, arguments = COMMANDS[Path(command[0]).name], command[1:]
    while isinstance(parser, click.Group):
        name, found, arguments = parser.resolve_command(click.Context(parser), arguments)
        assert found is not None, f"{command}: there is no {name}"
        parser = found
    return parser.make_context(parser.name, list(arguments)).params


def exec_starts(unit: Path) -> list[list[str]]:
    lines = unit.read_text().splitlines()
    return [line.removeprefix("ExecStart=").split() for line in lines if line.startswith("ExecStart=")]


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze on this machine")
    for unit in (DEPLOY / "systemd").iterdir():  # systemd looks whether the programs are there
        text = unit.read_text().replace("/opt/mllm-assets/.venv", sys.prefix).replace("/opt/mllm-assets", str(tmp_path))
        (tmp_path / unit.name).write_text(text)
    units = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_may_write_its_own_state_only(unit: Path) -> None:
    settings = unit.read_text().splitlines()
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes", "User=mllm-assets"):
        assert line in settings, f"{unit.name} lacks {line}"


def test_only_the_code_location_reads_the_secrets() -> None:
    """The webserver is what a stranger reaches first."""
    readers = [unit.stem for unit in UNITS if "secrets.env" in unit.read_text()]
    assert readers == ["mllm-assets-code"]


def test_the_compose_file_follows_the_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, DEPLOY / "compose.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_service_has_a_health_check_and_waits_for_the_one_before(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert all("healthcheck" in service for service in services.values())
    waits = {name: list(service.get("depends_on", [])) for name, service in services.items()}
    assert waits == {"postgres": [], "code": ["postgres"], "webserver": ["code"], "daemon": ["code"]}


def test_compose_publishes_the_webserver_alone_and_on_loopback(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published == {"webserver": ["127.0.0.1:3000:3000"]}


def test_compose_holds_no_secret_of_its_own(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if any(word in name for word in ("PASSWORD", "TOKEN", "WEBHOOK", "KEY")):
                assert value is None or value.startswith("${"), name  # null hands on what the shell has


def test_dagster_understands_every_command(compose: dict[str, Any]) -> None:
    """A mistyped option shows only when a container starts, and then again and again."""
    services = {name: service["command"] for name, service in compose["services"].items() if "command" in service}
    assert parse(services["code"])["host"] == "0.0.0.0" and parse(services["code"])["port"] == 4000
    assert parse(services["webserver"])["workspace"] == ("deploy/workspace.yaml",)
    assert parse(services["daemon"])["workspace"] == ("deploy/workspace.yaml",)
    for service in compose["services"].values():
        kind, *check = service["healthcheck"]["test"]
        if kind == "CMD" and check[0] in COMMANDS:
            parse(check)
    for unit in UNITS:
        for command in exec_starts(unit):
            if Path(command[0]).name in COMMANDS:
                host = parse(command).get("host", "127.0.0.1")
                assert host in ("127.0.0.1", "localhost"), f"{unit.name} listens on {host}"


def test_the_workspace_asks_the_host_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_ASSETS_CODE_HOST", "code")
    [origin] = location_origins_from_yaml_paths([str(DEPLOY / "workspace.yaml")])
    assert (origin.location_name, getattr(origin, "host", None), getattr(origin, "port", None)) == (
        "mllm_assets",
        "code",
        4000,
    )


def test_the_image_copies_what_the_package_is_built_from() -> None:
    root = DEPLOY.parent
    lines = (DEPLOY / "Dockerfile").read_text().partition("\nRUN pip install")[0].splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    let_in = {line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    project, wheel = settings["project"], settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {project["readme"], *project["license-files"], *wheel["force-include"], "pyproject.toml", "mllm_assets"}
    assert needed <= copied <= let_in


def test_the_image_holds_what_its_file_copies() -> None:
    root = DEPLOY.parent
    lines = [line.split() for line in (DEPLOY / "Dockerfile").read_text().splitlines()]
    copied = [name for words in lines if words[:1] == ["COPY"] for name in words[1:-1]]
    let_in = {line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied and all(os.path.exists(root / name) and name in let_in for name in copied)
