"""Alerts reach a webhook, are tried again within bounds, and show its address nowhere."""

import http.server
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest

from mllm_assets.components.automation.failures import describe_failure, failure_alert
from mllm_assets.errors import SourceError
from mllm_assets.operations.alerts import WEBHOOK_VARIABLE, check_alerts, post_alert

SECRET = "planted-secret"


class Receiver(http.server.ThreadingHTTPServer):
    """Takes what is posted, after it has answered with each of `refusals` once."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refusals: list[int] = []
        self.alerts: list[dict[str, Any]] = []
        self.num_requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hooks/{SECRET}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the terminal."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.num_requests += 1
        status = self.server.refusals.pop(0) if self.server.refusals else 200
        if status == 200:
            self.server.alerts.append(json.loads(body))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_what_passes_is_tried_again_and_then_delivered_once(receiver: Receiver) -> None:
    receiver.refusals = [503, 429]
    post_alert(receiver.url, {"text": "ä"}, waits_s=(0.01, 0.01))
    assert receiver.alerts == [{"text": "ä"}]
    assert receiver.num_requests == 3


@pytest.mark.parametrize(
    ("refusals", "message"),
    [([500] * 9, "it answered 500 after 3 attempts"), ([404] * 9, "it answered 404 after 1 attempt.")],
)
def test_attempts_are_bounded_and_a_refusal_is_not_repeated(
    receiver: Receiver, refusals: list[int], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.refusals = refusals
    with caplog.at_level(logging.DEBUG), pytest.raises(SourceError, match=message) as caught:
        post_alert(receiver.url, {}, waits_s=(0.01, 0.01))
    assert SECRET not in str(caught.value) + caplog.text
    assert receiver.alerts == []


@pytest.mark.parametrize(
    "url", [f"http://127.0.0.1:9/{SECRET}", f"file:///{SECRET}", f"http://127.0.0.1:9/a b{SECRET}"]
)
def test_an_address_that_does_not_answer_or_is_none_is_reported_without_it(url: str) -> None:
    with pytest.raises(SourceError, match=WEBHOOK_VARIABLE) as caught:
        post_alert(url, {}, waits_s=(0.01,))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"https://[::1/{SECRET}", "is not an http or https address. Correct it where the code location is started"),
        (f"https:///{SECRET}", "is not an http or https address"),
        (f"https://user:{SECRET}@127.0.0.1/hook", "holds a user name, which is not sent"),
    ],
)
def test_an_address_that_cannot_be_posted_to_is_found_before_the_first_alert(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first was a ValueError that shows the address, the last never arrived, and doctor was content with all."""
    with pytest.raises(SourceError, match=f"{WEBHOOK_VARIABLE} {message}") as caught:
        post_alert(url, {})
    assert SECRET not in str(caught.value)
    monkeypatch.setenv(WEBHOOK_VARIABLE, url)
    [finding] = check_alerts()
    assert finding.status == "fail" and SECRET not in finding.detail + finding.next_step


@dg.asset(key=["mine", "checkpoint"])
def broken() -> dg.MaterializeResult:
    raise dg.Failure(description="mine.yaml: unknown key 'learning_rte'.", allow_retries=False)


def test_a_failed_run_is_told_with_recipe_step_and_the_message_for_people(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WEBHOOK_VARIABLE, receiver.url)
    monkeypatch.setenv("MLLM_ASSETS_UI_URL", "https://dagster.example/")
    sensor = failure_alert(["mine"])
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([broken], instance=instance, raise_on_error=False)
        failure = result.get_run_failure_event()
        context = dg.build_run_status_sensor_context(
            sensor_name="failure_alert",
            dagster_instance=instance,
            dagster_run=result.dagster_run,
            dagster_event=failure,
        ).for_run_failure()
        sensor(context)
    [alert] = receiver.alerts
    link = f"https://dagster.example/runs/{result.run_id}"
    assert alert == {
        "event": "run_failed",
        "run_id": result.run_id,
        "job": result.dagster_run.job_name,
        "recipe": "mine",
        "step": "mine__checkpoint",
        "num_failed_steps": 1,
        "error": "mine.yaml: unknown key 'learning_rte'.",
        "link": link,
        "text": f"mine__checkpoint of run {result.run_id[:8]} failed: mine.yaml: unknown key 'learning_rte'. {link}",
    }


@dg.asset(
    key=["mine", "eval_metrics"],
    check_specs=[
        dg.AssetCheckSpec(name, asset=["mine", "eval_metrics"], blocking=blocking)
        for name, blocking in (("beats_base_model", True), ("uses_the_image", True), ("is_fast", False))
    ],
)
def weak() -> dg.MaterializeResult:
    results = [
        dg.AssetCheckResult(
            check_name="beats_base_model", passed=False, description="loss 1.2, base 1.1: expected -0.1."
        ),
        dg.AssetCheckResult(check_name="uses_the_image", passed=True, description="gain 0.3."),
        dg.AssetCheckResult(check_name="is_fast", passed=False, description="12 s."),
    ]
    return dg.MaterializeResult(check_results=results)


def test_failed_gates_are_told_with_their_figures() -> None:
    """The alert began with the name of Dagster's exception and held the checks' names alone."""
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([weak], instance=instance, raise_on_error=False)
        context = dg.build_run_status_sensor_context(
            sensor_name="failure_alert",
            dagster_instance=instance,
            dagster_run=result.dagster_run,
            dagster_event=result.get_run_failure_event(),
        ).for_run_failure()
        alert = describe_failure(context, ["mine"])
    assert alert["error"] == "check failed: beats_base_model of mine/eval_metrics: loss 1.2, base 1.1: expected -0.1."


def test_without_a_webhook_the_sensor_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WEBHOOK_VARIABLE, raising=False)
    assert failure_alert([]).default_status is dg.DefaultSensorStatus.STOPPED
