"""Bounded patience with a server: what passes is tried again, and no request waits for ever.

The library's own retries are not used: they wait as long as a server asks, 28 s where there is no network.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # between the attempts at one request
MAX_ASKED_WAIT_S = 60.0  # the longest Retry-After that is followed; the Hub's own window is 5 minutes
PASSING_STATUS = {408, 429, 500, 502, 503, 504}


class CutOff(OSError):
    """An answer was shorter than what was asked for."""


def within(timeout_s: float, action: Callable[[], T]) -> T:
    """Run an action in a thread that may be left behind: a name look-up has no timeout of its own."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = action()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if "error" in outcome:
        raise outcome["error"]
    if "value" not in outcome:
        raise TimeoutError(f"no answer within {timeout_s:.0f} s")
    return outcome["value"]


def patiently(action: Callable[[], T], *, deadline_s: float | None = None) -> T:
    """Run an action again after what passes: 429, 5xx, a broken or silent connection, an answer cut short.

    Waits as long as `Retry-After` or the Hub's `RateLimit` header asks, up to a minute, otherwise longer each time.

    Args:
        action: One request.
        deadline_s: No attempt starts after this moment of `time.monotonic`, unless the server asked to wait.
    """
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (its HTTP client's base)

    for wait_s in (*WAITS_S, None):
        try:
            return action()
        except (HTTPError, CutOff) as error:
            response = getattr(error, "response", None)
            if wait_s is None or (response is not None and response.status_code not in PASSING_STATUS):
                raise
            asked_s = asked_wait_s(response)
            late = deadline_s is not None and time.monotonic() + wait_s > deadline_s
            if late if asked_s is None else asked_s > MAX_ASKED_WAIT_S:
                raise
        time.sleep(wait_s if asked_s is None else asked_s)
    raise AssertionError("the last attempt returns or raises")


def asked_wait_s(response: Any) -> float | None:
    """How long a server asks to wait, by its headers, or None."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if response is None:
        return None
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0  # the header is rounded down
    asked = response.headers.get("Retry-After", "")
    return float(asked) if asked.isdecimal() else None
