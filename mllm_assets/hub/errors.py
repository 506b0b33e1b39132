"""The Hugging Face Hub's errors as messages that say what to do and hold no secret.

No message holds `HF_TOKEN`, nor the query of a signed address.
"""

import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from mllm_assets.errors import SourceError
from mllm_assets.redaction import redacted

T = TypeVar("T")
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # between the attempts at one request
MAX_ASKED_WAIT_S = 60.0  # the longest Retry-After that is followed; the Hub's own window is 5 minutes
TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True, kw_only=True, slots=True)
class HubRepo:
    """A repository and what the user can do when it cannot be fetched.

    Attributes:
        kind: "dataset" or "model".
        revision: Branch, tag or commit; None is the default branch.
        setting: Where the id is set, for example "source.repo in the dataset's YAML".
        known: What is known of this repository's fate, or "".
        otherwise: What to use instead.
        endpoint: Another Hub than that of `HF_ENDPOINT`.
    """

    kind: str
    repo: str
    revision: str | None
    setting: str
    known: str = ""
    otherwise: str = ""
    endpoint: str | None = None


class NoSuchRevision(SourceError):
    """The repository exists, the revision does not."""


def hub_token() -> str | bool:
    """The token of the environment, or False: one that is stored on the machine is never sent.

    Raises:
        SourceError: It has a character that no token has; an HTTP client's own message would show it.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise SourceError(
            "HF_TOKEN holds a space, line break or letter that no token has. Copy the token again from "
            "https://huggingface.co/settings/tokens."
        )
    return token or False


def explained(hub: HubRepo, action: Callable[[], T]) -> T:
    """Run an action against the Hub; an error becomes a message that says what to do.

    Raises:
        SourceError: Gated, unknown, no such revision, offline or unreachable.
    """
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (its HTTP client's base)

    try:
        return action()
    except (HTTPError, errors.OfflineModeIsEnabled, errors.HFValidationError, OSError) as error:
        message = scrubbed(_explanation(hub, error)).strip()
        kind = NoSuchRevision if isinstance(error, errors.RevisionNotFoundError) else SourceError
    raise kind(message)  # outside of the block: a chained error would carry signed addresses into a traceback


def _explanation(hub: HubRepo, error: Exception) -> str:
    from huggingface_hub import errors

    what = f"The {hub.kind} {hub.repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    match error:
        case errors.HFValidationError():
            return f"{hub.repo!r} is not an id of the Hub. Write it as owner/name in {hub.setting}."
        case errors.GatedRepoError() if hub_token():
            return (
                f"{what} is gated, and the account of HF_TOKEN has no access yet. Accept its terms on its page on the "
                f"Hub with that account; a fine-grained token also needs the right to read gated repositories. "
                f"{hub.otherwise}"
            )
        case errors.GatedRepoError():
            return (
                f"{what} is gated. Accept its terms on its page on the Hub, then set HF_TOKEN to a token of that "
                f"account. {hub.otherwise}"
            )
        case errors.DisabledRepoError():
            return f"{what} was disabled by the Hub. {hub.known}Set {hub.setting} to another one. {hub.otherwise}"
        case errors.RevisionNotFoundError():
            return f"{what} has no revision {hub.revision!r}. Correct the revision next to {hub.setting}."
        case errors.RepositoryNotFoundError():
            return (
                f"The {hub.kind} {hub.repo!r} does not exist on the Hub, or is private. {hub.known}Correct "
                f"{hub.setting}, or set HF_TOKEN to a token that may read it. {hub.otherwise}"
            )
        case errors.OfflineModeIsEnabled():
            return (
                f"{hub.repo} cannot be fetched because HF_HUB_OFFLINE is set. {hub.known}Unset it where there is a "
                f"network. {hub.otherwise}"
            )
    if status == 401:
        return (
            f"The Hub does not accept HF_TOKEN for {hub.repo}: it is wrong, has expired or was revoked. Set HF_TOKEN "
            "to a valid token; a public repository needs none."
        )
    if status == 429:
        asked_s = retry_after_s(error.response)  # pyright: ignore[reportAttributeAccessIssue]
        wait = "a few minutes" if asked_s is None else f"{asked_s:.0f} s"
        return f"The Hub limits requests (429). Materialise again in {wait}; with HF_TOKEN set the limit is higher."
    if status == 403:
        return (
            f"The Hub forbids reading {hub.repo}. Give the token in HF_TOKEN the right to read it, or unset HF_TOKEN "
            f"where the {hub.kind} is public. {hub.otherwise}"
        )
    # the library's messages begin with empty lines
    cause = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"{hub.repo} cannot be fetched from the Hub ({cause}). {hub.known}Check the network and HF_ENDPOINT, then "
        f"materialise again. {hub.otherwise}"
    )


def scrubbed(text: str) -> str:
    """A text without the token, and without the queries and passwords of addresses, which may be signed."""
    text = re.sub(r"(https?://)[^\s/@]+@", r"\1", text)
    return redacted(re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]*", r"\1", text))


class CutOff(OSError):
    """An answer was shorter than requested."""


def with_timeout(timeout_s: float, action: Callable[[], T]) -> T:
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


def with_retries(action: Callable[[], T], *, deadline_s: float | None = None) -> T:
    """Run an action, and retry it after transient errors: 429, 5xx, a broken or silent connection, a cut-off answer.

    Waits as long as `Retry-After` or the Hub's `RateLimit` header asks, up to a minute, otherwise longer each time. No
    attempt starts after `deadline_s` of `time.monotonic`, unless the server asked to wait.
    """
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (its HTTP client's base)

    for wait_s in (*WAITS_S, None):
        try:
            return action()
        except (HTTPError, CutOff) as error:
            response = getattr(error, "response", None)
            if wait_s is None or (response is not None and response.status_code not in TRANSIENT_STATUS):
                raise
            asked_s = retry_after_s(response)
            late = deadline_s is not None and time.monotonic() + wait_s > deadline_s
            if late if asked_s is None else asked_s > MAX_ASKED_WAIT_S:
                raise
        time.sleep(wait_s if asked_s is None else asked_s)
    raise AssertionError("the last attempt returns or raises")


def retry_after_s(response: Any) -> float | None:
    """How long a server asks to wait, by its headers, or None."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if response is None:
        return None
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0  # the header is rounded down
    asked = response.headers.get("Retry-After", "")
    return float(asked) if asked.isdecimal() else None
