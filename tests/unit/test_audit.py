"""The audit of the pinned packages, against a stand-in of osv.dev on 127.0.0.1."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[2] / ".ci" / "audit.py"
pytestmark = pytest.mark.slow  # seconds of starting Python
FLAW = {
    "id": "GHSA-made-made-made",
    "aliases": ["CVE-2099-0001"],
    "summary": "A made flaw",
    "affected": [
        {
            "package": {"name": "pillow", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "13.0.1"}]}],
        }
    ],
}


class _Osv(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"vulns": [FLAW]} if asked["package"]["name"] == "pillow" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def osv() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Osv)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()
    server.server_close()


def audit(
    tmp_path: Path, osv: str, *, pins: str = "pillow==13.0.0\nrich==14.0.0\n", ignored: str = ""
) -> tuple[int, str]:
    (tmp_path / "pins.txt").write_text(pins)
    (tmp_path / "ignored.txt").write_text(ignored)
    done = subprocess.run(
        [sys.executable, AUDIT, tmp_path / "pins.txt", tmp_path / "ignored.txt"],
        env={**os.environ, "MLLM_ASSETS_OSV_URL": osv}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_a_known_vulnerability_fails_the_check_and_says_what_to_do(tmp_path: Path, osv: str) -> None:
    code, shown = audit(tmp_path, osv)
    assert code == 1
    assert "pillow 13.0.0: CVE-2099-0001 (GHSA-made-made-made), fixed in 13.0.1" in shown
    assert "Raise the version in pins.txt, or accept it in ignored.txt with a reason." in shown


def test_an_accepted_vulnerability_passes_and_needs_a_reason(tmp_path: Path, osv: str) -> None:
    code, shown = audit(tmp_path, osv, ignored="# accepted\nCVE-2099-0001 only TIFF is concerned, which is not read\n")
    assert (code, shown) == (0, "audit: 2 packages checked, 1 vulnerabilities accepted\n")
    code, shown = audit(tmp_path, osv, ignored="CVE-2099-0001\n")
    assert code == 1 and "ignored.txt:1: CVE-2099-0001 has no reason" in shown


def test_a_service_that_does_not_answer_is_said_and_does_not_fail_the_check(tmp_path: Path) -> None:
    code, shown = audit(tmp_path, "http://127.0.0.1:9/v1/query")
    assert code == 0 and "NOT CHECKED for vulnerabilities: no answer of http://127.0.0.1:9/v1/query" in shown


def test_pins_that_cannot_be_read_fail_the_check(tmp_path: Path, osv: str) -> None:
    """Else a mistake in constraints.txt would look like a service that is away."""
    code, shown = audit(tmp_path, osv, pins="pillow>=13\n")
    assert code == 1 and "pip-audit failed" in shown
