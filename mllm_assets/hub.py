"""Talk to the Hugging Face Hub: by byte ranges, with bounded patience, and with errors that say what to do.

`HF_TOKEN` is the only credential that is looked at; no message holds it, nor the query of a signed address.
The library's own retries are not used: they wait as long as a server asks, 28 s where there is no network.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mllm_assets.errors import SourceError

T = TypeVar("T")
REQUEST_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
REACH_TIMEOUT_S = 8.0  # the first contact, with its name look-up and retries, fails within this
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # between the attempts at one request
MAX_ASKED_WAIT_S = 60.0  # the longest Retry-After that is followed; the Hub's own window is 5 minutes
FILES_A_REQUEST = 500
PASSING_STATUS = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True, kw_only=True, slots=True)
class HubRepo:
    """A repository and what a person can do when it does not come.

    Attributes:
        kind: "dataset" or "model".
        revision: Branch, tag or commit; None is the default branch.
        setting: Where the id stands, for example "source.repo in the dataset's YAML".
        known: What is known of this repository's fate, or "".
        otherwise: What serves in its place.
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
    """The repository is there, the revision is not."""


class CutOff(OSError):
    """An answer was shorter than what was asked for."""


def hub_token() -> str | bool:
    """The token of the environment, or False: one that is stored on the machine is never sent.

    Raises:
        SourceError: It holds what no token holds; an HTTP client's own message would show it.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise SourceError(
            "HF_TOKEN holds a space, line break or letter that no token has. Copy the token again from "
            "https://huggingface.co/settings/tokens."
        )
    return token or False


def is_commit(revision: str | None) -> bool:
    """Whether a revision can never stand for anything else."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def find_repo(hub: HubRepo, *, revision: str | None = None, sizes: bool = False) -> Any:
    """What the Hub says of a revision: `sha` is its commit, `siblings` its files.

    Args:
        hub: The repository.
        revision: Another revision than the declared one.
        sizes: Ask for each file's `size`, `blob_id` and `lfs` too.

    Raises:
        SourceError: Unreachable (within 10 s), unknown, gated or withdrawn; says what to do.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint, token=hub_token())
    deadline_s = time.monotonic() + REACH_TIMEOUT_S

    def ask() -> Any:
        left_s = max(deadline_s - time.monotonic(), 1.0)
        timeout_s = min(REQUEST_TIMEOUT_S, left_s)
        info = api.dataset_info if hub.kind == "dataset" else api.model_info
        options = {"revision": revision or hub.revision, "timeout": timeout_s, "files_metadata": sizes}
        return within(left_s, lambda: info(hub.repo, **options))

    return explained(hub, lambda: patiently(ask, deadline_s=deadline_s - REQUEST_TIMEOUT_S))


def find_sizes(hub: HubRepo, commit: str, names: Sequence[str]) -> dict[str, int]:
    """The sizes of some files in bytes, in the order of their names.

    Raises:
        SourceError: The Hub does not give them.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint, token=hub_token())

    def ask(some: Sequence[str]) -> Any:
        paths = list(some)
        return within(READ_TIMEOUT_S, lambda: api.get_paths_info(hub.repo, paths, repo_type=hub.kind, revision=commit))

    parts = [names[start : start + FILES_A_REQUEST] for start in range(0, len(names), FILES_A_REQUEST)]
    found = [item for part in parts for item in explained(hub, lambda part=part: patiently(lambda: ask(part)))]
    sizes = {item.path: item.size for item in found}
    return {name: sizes[name] for name in names}


def read_range(hub: HubRepo, commit: str, name: str, start: int, stop: int) -> bytes:
    """The bytes `start` to `stop` (exclusive) of a file; what passes is tried again, for about a minute at most.

    Raises:
        SourceError: The Hub refuses or cannot be reached, or the range is not what came.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(hub.repo, name, repo_type=hub.kind, revision=commit, endpoint=hub.endpoint)
    # a compressed answer has other ranges: a CDN then sends the whole file
    wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    headers = {**build_hf_headers(token=hub_token()), **wanted}

    def fetch() -> bytes:
        with get_session().stream("GET", url, headers=headers, timeout=READ_TIMEOUT_S) as response:
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            # an answer that is not the range is not read: it may be the whole file
            if not _is_range(response, start, stop):
                raise SourceError(
                    f"{hub.repo}: the Hub answered {response.status_code} in place of bytes {start} to {stop} of "
                    f"{name}. Check HF_ENDPOINT and the proxy: one of them does not serve byte ranges."
                )
            data = response.read()
        if len(data) != stop - start:
            raise CutOff(f"{name} was cut off: {len(data)} of {stop - start} bytes came")
        return data

    return explained(hub, lambda: patiently(fetch))


def _is_range(response: Any, start: int, stop: int) -> bool:
    if response.status_code == 206:
        return response.headers.get("Content-Range", "").startswith(f"bytes {start}-{stop - 1}/")
    return response.status_code == 200 and start == 0 and response.headers.get("Content-Length") == str(stop)


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


def explained(hub: HubRepo, action: Callable[[], T]) -> T:
    """Run an action against the Hub; what goes wrong becomes a message that says what to do.

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
            return f"{hub.repo!r} is no id of the Hub. Write it as owner/name in {hub.setting}."
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
            return f"{what} has no revision {hub.revision!r}. Correct the revision beside {hub.setting}."
        case errors.RepositoryNotFoundError():
            return (
                f"There is no {hub.kind} {hub.repo!r} on the Hub, or it is private. {hub.known}Correct {hub.setting}, "
                f"or set HF_TOKEN to a token that may read it. {hub.otherwise}"
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
        asked_s = asked_wait_s(error.response)  # pyright: ignore[reportAttributeAccessIssue]
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
    token = os.environ.get("HF_TOKEN", "").strip()
    text = re.sub(r"(https?://)[^\s/@]+@", r"\1", text)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]*", r"\1", text)
    return text.replace(token, "HF_TOKEN") if token else text
