"""`mllm-assets serve` before it loads anything."""

import pytest

from mllm_assets.cli import main


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
