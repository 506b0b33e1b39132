"""What a Hub sends is read up to what was asked for, whatever its headers say."""

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

import mllm_assets.hub.client as client
from mllm_assets.errors import SourceError
from mllm_assets.hub.client import find_repo, read_range
from mllm_assets.hub.errors import HubRepo

pytestmark = pytest.mark.attack("HTTP")

SENT = 0


class Endless(http.server.BaseHTTPRequestHandler):
    """Says that 100 bytes come, and sends until the client goes, a byte at a time where the name says so."""

    def do_GET(self) -> None:
        global SENT
        if "error" in self.path:
            self.send_response(403)
        elif self.headers.get("Range"):
            self.send_response(206)
            self.send_header("Content-Range", "bytes 0-99/100")
        else:
            self.send_response(200)
        self.flush_headers()
        try:
            while "slow-head" in self.path:
                self.wfile.write(b"X-More: 1\r\n")
                time.sleep(0.05)
            self.end_headers()
            while "trickle" in self.path:
                self.wfile.write(b"x")
                time.sleep(0.05)
            while SENT < 200 * 2**20:
                self.wfile.write(b"x" * 2**16)
                SENT += 2**16
        except OSError:
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubRepo]:
    global SENT
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    SENT = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    yield HubRepo(kind="model", repo="a/b", revision=None, setting="repo", endpoint=endpoint)
    server.shutdown()
    server.server_close()


def test_a_range_is_read_no_further_than_asked(hub: HubRepo) -> None:
    with pytest.raises(SourceError, match="sent more than the 100 bytes of weights that were requested"):
        read_range(hub, "main", "weights", 0, 100)
    assert SENT < 20 * 2**20


def test_an_error_and_a_description_without_an_end_are_cut_off(hub: HubRepo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 2**20)
    for action in (lambda: read_range(hub, "main", "error", 0, 100), lambda: find_repo(hub)):
        with pytest.raises(SourceError, match="The Hub sent more than 1 MiB, more than was requested"):
            action()
    assert SENT < 100 * 2**20


def test_an_answer_that_trickles_is_given_up(hub: HubRepo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte came within the time for one, so a file of 16 MiB was read for half a year."""
    monkeypatch.setattr(client, "READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr("mllm_assets.hub.errors.WAITS_S", ())
    with pytest.raises(SourceError, match=r"\d bytes came in \d s, too few to wait for the rest"):
        read_range(hub, "main", "trickle", 0, 100)


def test_an_answer_whose_head_has_no_end_is_given_up(hub: HubRepo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "HEAD_TIMEOUT_S", 0.3)
    with pytest.raises(SourceError, match="no answer within 0 s"):
        read_range(hub, "main", "slow-head", 0, 100)
