"""What goes wrong with the Hugging Face Hub, in messages that say what to do and hold no secret.

No message holds `HF_TOKEN`, nor the query of a signed address.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mllm_assets.errors import SourceError
from mllm_assets.hub_patience import asked_wait_s
from mllm_assets.redaction import redacted

T = TypeVar("T")


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
    text = re.sub(r"(https?://)[^\s/@]+@", r"\1", text)
    return redacted(re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]*", r"\1", text))
