"""`dagster dev` for tests: started on a free port of 127.0.0.1 and asked through its GraphQL API."""

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.integration.conftest import Project, end_all, hear_interrupts, wait_for
from tests.ports import free_port

LOCATIONS = "{ workspaceOrError { ... on Workspace { locationEntries { name loadStatus } } } }"


class Server:
    """`dagster dev`, asked through its GraphQL API as its own page does."""

    def __init__(self, process: subprocess.Popen[Any], port: int) -> None:
        self.process, self.url = process, f"http://127.0.0.1:{port}"

    def query(self, query: str, **variables: Any) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=500) as response:
            return json.load(response)["data"]

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/server_info", timeout=5):
                return True
        except OSError:
            return False


@contextmanager
def serving(project: Project, *arguments: str) -> Iterator[Server]:
    """`dagster dev` within a block; Ctrl-C ends it. What it says is in a file: an unread pipe would stop it in time."""
    port = free_port()
    command = [sys.executable, "-m", "dagster", "dev", "-h", "127.0.0.1", "-p", str(port), *arguments]
    with (project.home / "dagster_dev.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=project.root, env=project.env, stdout=log, stderr=log, preexec_fn=hear_interrupts
        )
    try:
        server = Server(process, port)
        wait_for(server.is_up, "dagster dev")
        yield server
        process.send_signal(signal.SIGINT)
        process.wait(300)
    finally:
        end_all(project.root)  # a run that is going on outlives the server
        process.wait()


def loaded_location(server: Server) -> str:
    """The name of the one code location, once it is loaded."""

    def find() -> str | None:
        entries = server.query(LOCATIONS)["workspaceOrError"]["locationEntries"]
        return next((entry["name"] for entry in entries if entry["loadStatus"] == "LOADED"), None)

    return wait_for(find, "the code location")
