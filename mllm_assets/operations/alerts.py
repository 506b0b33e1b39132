"""Post alerts to a webhook. Its address holds a secret: no message and no log shows it."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from mllm_assets.errors import SourceError
from mllm_assets.operations.findings import Finding

WEBHOOK_VARIABLE = "MLLM_ASSETS_ALERT_WEBHOOK"
UI_VARIABLE = "MLLM_ASSETS_UI_URL"
TIMEOUT_S = 5.0
WAITS_S = (1.0, 4.0)  # between the attempts; with the timeouts a tick of Dagster's 60 s is not used up
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}


def webhook_url() -> str:
    """The address that alerts are sent to, or "" if none is set."""
    return os.environ.get(WEBHOOK_VARIABLE, "").strip()


def run_link(run_id: str) -> str:
    """The run's page in the UI, at the address in `MLLM_ASSETS_UI_URL`."""
    return f"{os.environ.get(UI_VARIABLE, 'http://127.0.0.1:3000').rstrip('/')}/runs/{run_id}"


def check_address(url: str) -> None:
    """Refuse an address that cannot be posted to, without showing it.

    Raises:
        SourceError: It is not an http or https address, or holds a user name, which would not be sent.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # its message may show the address
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SourceError(
            f"{WEBHOOK_VARIABLE} is not an http or https address. Correct it where the code location is started, which "
            "posts the alerts."
        )
    if parts.username is not None:
        raise SourceError(
            f"{WEBHOOK_VARIABLE} holds a user name, which is not sent. Give an address with its key in the "
            "path, or a relay's."
        )


def post_alert(url: str, alert: Mapping[str, Any], *, waits_s: Sequence[float] = WAITS_S) -> None:
    """Post an alert as JSON; transient errors (no connection, 429, 5xx) are retried after each wait.

    Raises:
        SourceError: It was not delivered. Says why and after how many attempts.
    """
    check_address(url)
    body = json.dumps(dict(alert), ensure_ascii=False).encode()
    reason, num_attempts = "", 0
    for wait_s in (*waits_s, None):
        num_attempts += 1
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                return
        except urllib.error.HTTPError as error:
            reason = f"it answered {error.code}"
            if error.code not in TRANSIENT_STATUS:
                break
        except (OSError, http.client.HTTPException, ValueError) as error:  # messages of these show the address
            cause = getattr(error, "reason", error)
            reason = f"no answer ({type(cause).__name__})"
        if wait_s is not None:
            time.sleep(wait_s)
    times = "1 attempt" if num_attempts == 1 else f"{num_attempts} attempts"
    raise SourceError(
        f"The alert was not delivered: {reason} after {times}. Check {WEBHOOK_VARIABLE} and the service behind it."
    )


def check_alerts() -> list[Finding]:
    """Check the webhook's address, if one is set."""
    if not (url := webhook_url()):
        return []
    try:
        check_address(url)
    except SourceError as error:
        return [Finding.of_error("alerts", "fail", error)]
    return [Finding("alerts", "ok", "a webhook is set; nothing was posted to it")]
