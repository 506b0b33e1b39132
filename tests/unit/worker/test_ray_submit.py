"""A Ray dashboard that closes connections: a job is handed over once, and what is refused is said."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.errors import MachineError
from mllm_assets.worker.ray_jobs import RayJob

ray_jobs = pytest.importorskip("ray.job_submission", reason="the extra ray is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.not_fast]


class Dashboard(ThreadingHTTPServer):
    """The parts of Ray's that a submission asks; `behaviour` says what becomes of each request to take a job."""

    def __init__(self, *behaviour: str) -> None:
        self.behaviour, self.taken = list(behaviour), list[str]()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Dashboard

    def answer(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode() if status == 200 else str(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if name == "version":
            self.answer(200, {"version": "4", "ray_version": "2.50.0", "ray_commit": "", "session_name": ""})
        elif name in self.server.taken:
            job = {"type": "SUBMISSION", "submission_id": name, "status": "PENDING", "entrypoint": "exec true"}
            self.answer(200, job)
        else:
            self.answer(404, f"Job {name} does not exist")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        does = self.server.behaviour.pop(0)
        if does in ("takes", "takes and is gone"):
            self.server.taken.append(asked["submission_id"])
        if does == "takes":
            self.answer(200, {"submission_id": asked["submission_id"], "job_id": asked["submission_id"]})
        elif does == "refuses":
            self.answer(500, "Traceback\nValueError: no such resource")
        else:
            self.close_connection = True  # without a word

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def dashboard(request: pytest.FixtureRequest) -> Iterator[Dashboard]:
    with Dashboard(*request.param) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def job(dashboard: Dashboard, folder: Path) -> RayJob:
    client = ray_jobs.JobSubmissionClient(f"http://127.0.0.1:{dashboard.server_port}")
    return RayJob(client=client, id="mllm-assets-job", folder=folder, task=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("dashboard", [["is gone", "takes"], ["takes and is gone"]], indirect=True)
def test_a_job_is_handed_over_once_however_often_connections_close(dashboard: Dashboard, tmp_path: Path) -> None:
    job(dashboard, tmp_path).submit(entrypoint="exec true")
    assert dashboard.taken == ["mllm-assets-job"]
    assert dashboard.behaviour == []


@pytest.mark.parametrize("dashboard", [["refuses"]], indirect=True)
def test_a_job_that_is_refused_is_an_error_with_the_reason(dashboard: Dashboard, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="Ray does not take the job mllm-assets-job: .*no such resource"):
        job(dashboard, tmp_path).submit(entrypoint="exec true")
