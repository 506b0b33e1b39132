"""Ports that cannot be had, and who reaches an address."""

import socket

import pytest

from mllm_assets.cli import main
from mllm_assets.errors import MachineError
from mllm_assets.inference.addresses import is_loopback, listen, names_of, url


def test_who_reaches_an_address() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"))
    assert names_of("127.0.0.2") == ["127.0.0.1", "127.0.0.2", "[::1]", "localhost"]
    assert url("::1", 80) == "http://[::1]:80" and url("127.0.0.1", 80) == "http://127.0.0.1:80"


def test_a_port_that_cannot_be_had_is_told_from_an_address_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            MachineError, match=f"Port {port} of 127.0.0.1 is in use by another program.*another --port"
        ):
            listen("127.0.0.1", port)
    with pytest.raises(MachineError, match="Cannot listen on 203.0.113.1 .* Give --host an address of this machine"):
        listen("203.0.113.1", 0)
    with pytest.raises(MachineError, match="There is no port 99999: ports are 1 to 65535"):
        listen("127.0.0.1", 99999)


def test_a_page_for_the_network_names_no_option_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")  # its absence is said before
    monkeypatch.delenv("MLLM_ASSETS_API_KEY", raising=False)
    assert main(["chat", "nowhere", "--host", "0.0.0.0"]) == 2
    error = capsys.readouterr().err
    assert "MLLM_ASSETS_API_KEY is not set" in error and "leave --host out" in error and "--no-auth" not in error
