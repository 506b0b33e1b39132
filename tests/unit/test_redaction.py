"""No secret in a text that leaves the process."""

import logging
import sys

import pytest

from mllm_assets.errors import SourceError
from mllm_assets.redaction import holds_secret, redacted, redacted_output, redacted_value
from mllm_assets.training.launch import WorkerCrashed

TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"401 for {TOKEN}.", "401 for [secret]."),
        ("s3://AKIAABCDEFGHIJKLMNOP/x", "s3://[secret]/x"),
        ("https://me:pass/word@hub.test/a".replace("/word", "word"), "https://hub.test/a"),
        ("postgresql+psycopg2://dagster:secret1@db:5432/d", "postgresql+psycopg2://db:5432/d"),
        ("postgresql://u:pa/ss@w0rd1@db/x", "postgresql://db/x"),
        ("https://tokenonly1234567@host/x", "https://host/x"),
        ("https://a:b@one.test/x,https://c:d@two.test/y", "https://one.test/x,https://two.test/y"),
        ("http://127.0.0.1:3000/runs/a@b and ssh://git@github.com/a/b", None),
        ("postgresql://dagster@db/dagster", None),
        ("The secret: ingredient is love", None),
        ("password : none was given. A secret: patience!", None),
        ("The password: hunter2hunter", "The password: [secret]"),
        ("secret: correcthorsebatterystaple", "secret: [secret]"),
        ("password=abc", "password=[secret]"),
        ("my_secret: abc", "my_secret: [secret]"),
        ('{"secret": "abc"}', '{"secret": "[secret]"}'),
        ("https://hooks.slack.com/services/T0/B0/xyz", "https://hooks.slack.com/services/[secret]"),
        ("argument 'hub_token=abc'", "argument 'hub_token=[secret]'"),
        ('{"swanlab_api_key": "abc"}', '{"swanlab_api_key": "[secret]"}'),
        ("hub_token=null", "hub_token=null"),
        ("export SERVE_API_KEY=$(openssl rand -hex 24)", None),
        ("eos_token: <end_of_turn>, num_tokens=12", "eos_token: <end_of_turn>, num_tokens=12"),
        ("see https://huggingface.co/settings/tokens", "see https://huggingface.co/settings/tokens"),
        ("hf_home and a digest 4be1c2d3e4f5a6b7c8d9e0f1a2b3c4d5e6f7a8b9", None),
    ],
)
def test_what_looks_like_a_secret_is_not_shown(text: str, shown: str | None) -> None:
    assert redacted(text) == (shown or text)


def test_values_of_the_environment_are_named_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a/b+c=defgh")
    monkeypatch.setenv("SHORT_TOKEN", "a")  # would be found in every word
    monkeypatch.setenv("TEAMS_WEBHOOK_URL", "https://chat.test/hooks/abcdef")
    monkeypatch.setenv("PGPASS", "elephants")
    assert redacted("at https://chat.test/hooks/abcdef with elephants") == "at TEAMS_WEBHOOK_URL with PGPASS"
    assert redacted("key 0123456789abcdef, a/b+c=defgh, a%2Fb%2Bc%3Ddefgh") == (
        "key WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, AWS_SECRET_ACCESS_KEY"
    )
    assert redacted_value({"a": [TOKEN, 1, None], "b": 0.5}) == {"a": ["[secret]", 1, None], "b": 0.5}
    assert holds_secret({"a": [{"b": "0123456789abcdef"}]}) and not holds_secret({"a": ["b", 1, None]})


def test_errors_and_crashes_show_no_secret() -> None:
    assert str(SourceError(f"no access with {TOKEN}")) == "no access with [secret]"
    crash = WorkerCrashed(f"Traceback: {TOKEN}", exit_code=1, signal_number=None)
    assert str(crash) == "Traceback: [secret]"


def test_prints_and_logs_are_redacted_and_the_streams_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    streams = sys.stdout, sys.stderr
    with redacted_output():
        print("printed", TOKEN)
        sys.stderr.writelines([f"written {TOKEN}\n"])
        handler = logging.StreamHandler()
        logger = logging.getLogger("library")
        logger.addHandler(handler)
        logger.warning("logged %s", TOKEN)
        logger.removeHandler(handler)
    assert (sys.stdout, sys.stderr) == streams
    shown = "".join(capfd.readouterr())
    assert TOKEN not in shown and shown.count("[secret]") == 3
