"""The artefact store's errors as messages that say what to do and hold no secret."""

import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from mllm_assets.errors import SourceError
from mllm_assets.redaction import redacted

T = TypeVar("T")
SETTING = "MLLM_ASSETS_STORE"
# A request is retried after 5xx, 429 and broken connections; an attempt to connect ends after some seconds
S3_CONFIG = {"retries": {"max_attempts": 3, "mode": "standard"}, "connect_timeout": 5, "read_timeout": 60}


class NotThere(SourceError):
    """The store has no such object."""


def connect(url: str) -> tuple[Any, str]:
    """The file system of a store's address, and the path in it.

    Raises:
        SourceError: The address is not valid, holds a secret, or its extra is not installed.
    """
    protocol, _, path = url.partition("://")
    if protocol not in ("s3", "file") or not path.strip("/"):
        raise SourceError(
            f"{SETTING} is {_without_secrets(url)!r}, which is not a store. Set it to s3://bucket/prefix, or to "
            "file:///folder where all machines see that folder."
        )
    if protocol == "s3" and not re.fullmatch(r"[A-Za-z0-9.\-]+(/[^?#@]*)?", path):
        raise SourceError(
            f"{SETTING} must be s3://bucket/prefix and nothing more: keys belong in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, another endpoint in AWS_ENDPOINT_URL."
        )
    from fsspec import filesystem

    if protocol == "file":
        return filesystem("file", auto_mkdir=True), path
    try:
        fs = filesystem("s3", config_kwargs=S3_CONFIG, use_listings_cache=False, anon=False)
    except ImportError as error:
        raise SourceError(
            f"{SETTING} is {url}, but s3fs is not installed ({error}). Install it: pip install 'mllm-assets[s3]'"
        ) from None
    return fs, path


def explained(url: str, action: Callable[[], T], *, what: str = "") -> T:
    """Run a request to the store; an error becomes a message that names `what` was requested, and says what to do.

    Raises:
        NotThere: The object does not exist.
        SourceError: No credentials, permission, bucket, network, or space.
    """
    try:
        return action()
    except (OSError, *_library_errors()) as error:
        kind, message = _explanation(url, error, what)
    raise kind(message)  # outside of the block: a chained error may carry signed addresses into a traceback


def _explanation(url: str, error: BaseException, what: str) -> tuple[type[SourceError], str]:
    code = getattr(error.__cause__ or error, "response", {}).get("Error", {}).get("Code", "")
    name = type(error).__name__
    bucket = url.removeprefix("s3://").split("/")[0]
    if code == "NoSuchBucket":
        return SourceError, (
            f"The bucket {bucket!r} of {SETTING}={url} does not exist. Create it, or correct the setting; with "
            "an endpoint other than Amazon's, AWS_ENDPOINT_URL must name it."
        )
    if isinstance(error, FileNotFoundError):
        return NotThere, f"{what or 'The object'} is not in {url}. Materialise its asset again where it was made."
    if name in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"):
        return SourceError, (
            f"No credentials for {url}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) in the "
            "environment of the process that materialises, the daemon's included."
        )
    if isinstance(error, PermissionError):
        return SourceError, (
            f"{url} refuses this machine ({code or error}). Its credentials need the right to list the bucket and to "
            "read and write below the prefix; AWS_* of the environment say which are used."
        )
    cause = " ".join(_without_secrets(str(error)).split()) or name
    return SourceError, (
        f"{url} cannot be reached, or the connection broke ({cause[:300]}). What was made here is kept. Check "
        f"the network, AWS_ENDPOINT_URL and AWS_DEFAULT_REGION, then materialise again: only what is missing is sent."
    )


def _library_errors() -> tuple[type[BaseException], ...]:
    """The errors of the loaded libraries; a folder's are those of the system."""
    found = []
    for module, names in {"botocore.exceptions": ("BotoCoreError", "ClientError"), "aiohttp": ("ClientError",)}.items():
        found += [getattr(sys.modules[module], name) for name in names if module in sys.modules]
    return tuple(found)


def _without_secrets(text: str) -> str:
    """The text without the queries of addresses, which may be signed."""
    return redacted(re.sub(r"\?[^\s'\")]*", "", text))
