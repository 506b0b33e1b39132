"""`mllm-assets serve` before it loads anything."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mllm_assets.cli import main
from mllm_assets.inference.addresses import listen

MODEL = Path(__file__).parents[2] / "golden" / "parity" / "model"
NEEDED = ("fastapi", "uvicorn", "openai", "gradio")  # the commands ask for these first
pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in NEEDED), reason="the extra `serve` and gradio are not installed"
)


@pytest.mark.parametrize("key", ["", "short", "with a space in the middle"])
def test_a_server_without_a_good_key_does_not_start_and_says_how_to_make_one(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLLM_ASSETS_API_KEY", key)
    assert main(["serve", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert "Make a key with: export MLLM_ASSETS_API_KEY=$(openssl rand -hex 24); or give --no-auth" in error
    assert not key or key not in error


def test_a_server_without_a_key_is_for_this_machine_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "nowhere", "--no-auth", "--host", "0.0.0.0"]) == 2
    assert "--no-auth on 0.0.0.0 would let everyone in the network use the model." in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["serve", "chat"])
def test_a_taken_port_is_said_before_any_library_loads(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Libraries take half a minute to load, and the model comes after them."""
    monkeypatch.setenv("MLLM_ASSETS_API_KEY", "a-key-that-is-long-enough")
    for module in ("serving", "chat_page"):
        monkeypatch.setitem(sys.modules, f"mllm_assets.inference.{module}", None)  # whoever imports it fails
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main([verb, str(MODEL), "--port", str(port)]) == 2
    assert f"Port {port} of 127.0.0.1 is in use by another program" in capsys.readouterr().err
