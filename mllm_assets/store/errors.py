"""The artefact store's errors as messages that say what to do and hold no secret."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from mllm_assets.errors import SourceError
from mllm_assets.redaction import redacted
from mllm_assets.store.clouds import CLOUDS, NO_BUCKET, NO_CREDENTIALS, error_code, is_refusal, library_errors

T = TypeVar("T")
SETTING = "MLLM_ASSETS_STORE"


class NotThere(SourceError):
    """The store has no such object."""


def connect(url: str) -> tuple[Any, str]:
    """The file system of a store's address, and the path in it.

    Raises:
        SourceError: The address is not valid, holds a secret, or its extra is not installed.
        NoAccount: The environment does not say whose storage it is.
    """
    protocol, _, path = url.partition("://")
    cloud = CLOUDS.get(protocol)
    if not (cloud or protocol == "file") or not path.strip("/"):
        others = ", ".join(one.address for one in CLOUDS.values())
        raise SourceError(
            f"{SETTING} is {_without_secrets(url)!r}, which is not a store. Set it to {others}, or to file:///folder "
            "where all machines see that folder."
        )
    if cloud is None:
        from fsspec import filesystem

        return filesystem("file", auto_mkdir=True), path
    if not re.fullmatch(r"[A-Za-z0-9._\-]+(/[^?#@]*)?", path):
        raise SourceError(
            f"{SETTING} must be {cloud.address} and nothing more: keys belong in the environment, for {protocol} in "
            f"{cloud.keys}; another endpoint too."
        )
    try:
        return cloud.open(), path
    except ImportError as error:
        raise SourceError(
            f"{SETTING} is {url}, but {cloud.package} is not installed ({error}). Install it: "
            f"pip install 'mllm-assets[{cloud.extra}]'"
        ) from None


def explained(url: str, action: Callable[[], T], *, what: str = "", writes: bool = False) -> T:
    """Run a request to the store; an error becomes a message that names `what` was requested, and says what to do.

    Raises:
        NotThere: The object does not exist.
        SourceError: No credentials, permission, bucket, network, or space.
    """
    try:
        return action()
    except (OSError, *library_errors()) as error:
        kind, message = _explanation(url, error, what, writes=writes)
    raise kind(message)  # outside of the block: a chained error may carry signed addresses into a traceback


def _explanation(url: str, error: BaseException, what: str, *, writes: bool) -> tuple[type[SourceError], str]:
    protocol, _, path = url.partition("://")
    cloud, code, name = CLOUDS.get(protocol), error_code(error), type(error).__name__
    if cloud and (code in NO_BUCKET or (writes and isinstance(error, FileNotFoundError))):
        return SourceError, (
            f"The {cloud.bucket} {path.split('/')[0]!r} of {SETTING}={url} does not exist. Create it, or correct the "
            f"setting; {cloud.network} decide which server is asked."
        )
    if isinstance(error, FileNotFoundError):
        return NotThere, f"{what or 'The object'} is not in {url}. Materialise its asset again where it was made."
    if cloud and name in NO_CREDENTIALS:
        return SourceError, (
            f"No credentials for {url}. Set {cloud.keys} in the environment of the process that materialises, the "
            "daemon's included."
        )
    cause = " ".join(_without_secrets(str(error)).split()) or name
    if cloud and is_refusal(error, code):
        return SourceError, (
            f"{url} refuses this machine ({code or cause[:300]}). Its credentials need the right to list the "
            f"{cloud.bucket} and to read and write below the prefix; {cloud.keys} say which are used."
        )
    check = f"the network, {cloud.network}" if cloud else "the folder"
    return SourceError, (
        f"{url} cannot be reached, or the connection broke ({cause[:300]}). What was made here is kept. Check {check}, "
        "then materialise again: only what is missing is sent."
    )


def _without_secrets(text: str) -> str:
    """The text without the queries of addresses, which may be signed."""
    return redacted(re.sub(r"\?[^\s'\")]*", "", text))
