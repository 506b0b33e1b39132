"""Talk to the Hugging Face Hub: answers within seconds, and errors that say what to do."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from mllm_assets.errors import SourceError

T = TypeVar("T")
# the libraries retry for 28 s before they say that there is no network; a request with its name look-up gets this
REACH_TIMEOUT_S = 8.0
REQUEST_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class HubRepo:
    """A repository and what a person can do when it does not come.

    Attributes:
        kind: "dataset" or "model".
        setting: Where the id stands, for example "source.repo in the dataset's YAML".
        known: What is known of this repository's fate, or "".
        otherwise: What serves in its place.
    """

    kind: str
    repo: str
    revision: str | None
    setting: str
    known: str = ""
    otherwise: str = ""


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
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return outcome["value"]


def explained(hub: HubRepo, action: Callable[[], T]) -> T:
    """Run an action against the Hub; what goes wrong becomes a message that says what to do.

    Raises:
        SourceError: Gated, unknown, no such revision, offline or unreachable.
    """
    import pyarrow as pa
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] (its HTTP client's base)

    try:
        return action()
    except errors.GatedRepoError as error:
        raise SourceError(
            f"The {hub.kind} {hub.repo} is gated. Accept its terms on its page on the Hub, then set HF_TOKEN to a "
            f"token of that account. {hub.otherwise}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(
            f"The {hub.kind} {hub.repo} has no revision {hub.revision!r}. Correct the revision beside {hub.setting}."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"There is no {hub.kind} {hub.repo!r} on the Hub, or it is private. {hub.known}Correct {hub.setting}, or "
            f"set HF_TOKEN to a token that may read it. {hub.otherwise}"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise SourceError(
            f"{hub.repo} cannot be fetched because HF_HUB_OFFLINE is set. {hub.known}Unset it where there is a "
            f"network. {hub.otherwise}"
        ) from error
    except (errors.HfHubHTTPError, HTTPError, OSError, pa.ArrowException) as error:  # Arrow: a file that is cut off
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(
            f"{hub.repo} cannot be fetched from the Hub ({cause}). {hub.known}Check the network and HF_ENDPOINT, then "
            f"materialise again. {hub.otherwise}"
        ) from error
