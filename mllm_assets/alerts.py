"""Tell a webhook what went wrong while nobody looked. Its address holds a secret: no message and no log shows it."""

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

WEBHOOK_VARIABLE = "MLLM_ASSETS_ALERT_WEBHOOK"
UI_VARIABLE = "MLLM_ASSETS_UI_URL"
TIMEOUT_S = 5.0
WAITS_S = (1.0, 4.0)  # between the attempts; with the timeouts a tick of Dagster's 60 s is not used up
PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}


def webhook_url() -> str:
    """The address that alerts are sent to, or "" where none is set."""
    return os.environ.get(WEBHOOK_VARIABLE, "").strip()


def run_link(run_id: str) -> str:
    """The run's page in the UI, which lies where `MLLM_ASSETS_UI_URL` says."""
    return f"{os.environ.get(UI_VARIABLE, 'http://127.0.0.1:3000').rstrip('/')}/runs/{run_id}"


def check_address(url: str) -> None:
    """Refuse what cannot be posted to, without showing it.

    Raises:
        SourceError: It is no address of http or https, or holds a user's name, which would not be sent.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # its message may show the address
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SourceError(
            f"{WEBHOOK_VARIABLE} is no address of http or https. Correct it where the code location is started, which "
            "posts the alerts."
        )
    if parts.username is not None:
        raise SourceError(
            f"{WEBHOOK_VARIABLE} holds a user's name, which is not sent. Give an address that holds its key in the "
            "path, or a relay's."
        )


def post_alert(url: str, alert: Mapping[str, Any], *, waits_s: Sequence[float] = WAITS_S) -> None:
    """Post an alert as JSON; what passes (no connection, 429, 5xx) is tried again after each wait.

    Raises:
        SourceError: It was not taken. Says why and how often it was tried.
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
            if error.code not in PASSING_STATUS:
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
