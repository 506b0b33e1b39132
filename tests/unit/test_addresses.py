"""No server listens to the network unless it is told to."""

from pathlib import Path

import pytest

from mllm_assets.cli import parse

MAKEFILE = (Path(__file__).parents[2] / "Makefile").read_text()


@pytest.mark.parametrize("command", [["serve", "models/a"], ["chat", "models/a"]])
def test_the_projects_own_servers_listen_on_loopback(command: list[str]) -> None:
    assert parse(command).host == "127.0.0.1"


def test_make_starts_servers_on_loopback() -> None:
    started = [line for line in MAKEFILE.splitlines() if "dg dev" in line or "mkdocs serve" in line]
    assert len(started) == 2 and all("127.0.0.1" in line for line in started)
