"""An S3 server on this machine: moto's, behind a door that can say 503 and 403."""

import logging
import threading
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

BUCKET = "models"


@dataclass
class S3Server:
    """Where it listens, and what it does to the next requests."""

    endpoint: str
    num_busy: int = 0  # answer so many requests with 503
    forbidden: Collection[str] = ()  # methods that are answered with 403
    requests: list[str] = field(default_factory=list)

    def make_bucket(self, name: str = BUCKET) -> None:
        import boto3

        boto3.client("s3", endpoint_url=self.endpoint).create_bucket(Bucket=name)


def answering(server: S3Server, app: Callable[..., Any]) -> Callable[..., Iterable[bytes]]:
    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        server.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if server.num_busy > 0:
            server.num_busy -= 1
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"]
        if environ["REQUEST_METHOD"] in server.forbidden:
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        return app(environ, start_response)

    return answer


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Serve S3 on a free port, with credentials and endpoint in the environment as a user sets them."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = S3Server("")
    moto = DomainDispatcherApplication(create_backend_app)
    http = make_server("127.0.0.1", 0, answering(server, moto), threaded=True)
    server.endpoint = f"http://127.0.0.1:{http.server_port}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "planted-key-id",
        "AWS_SECRET_ACCESS_KEY": "planted-secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.endpoint,
    }.items():
        monkeypatch.setenv(name, value)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    urllib.request.urlopen(urllib.request.Request(f"{server.endpoint}/moto-api/reset", method="POST")).read()
    server.requests.clear()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join(10)
        http.server_close()
