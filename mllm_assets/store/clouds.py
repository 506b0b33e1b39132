"""The clouds that an artefact store can be in: how each is opened, where its keys belong, what its errors mean."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# A request is retried after 5xx, 429 and broken connections; an attempt to connect ends after some seconds
S3_CONFIG = {"retries": {"max_attempts": 3, "mode": "standard"}, "connect_timeout": 5, "read_timeout": 60}
AZURE_VARIABLES = ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME")


class NoAccount(Exception):
    """The environment does not say whose storage it is."""


def _s3() -> Any:
    from fsspec import filesystem

    return filesystem("s3", config_kwargs=S3_CONFIG, use_listings_cache=False, anon=False)


def _gs() -> Any:
    from gcsfs.core import GCSFileSystem  # the default first asks for the bucket's kind by gRPC, for minutes

    token = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else "google_default"
    return GCSFileSystem(token=token, use_listings_cache=False)


def _abfs() -> Any:
    from fsspec import filesystem

    if not any(os.environ.get(name) for name in AZURE_VARIABLES):
        raise NoAccount
    return filesystem("abfs", use_listings_cache=False, anon=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cloud:
    """One kind of store.

    Attributes:
        extra: What to install, which is also the address's scheme.
        package: The library of the extra.
        bucket: What the first part of the address is called.
        keys: Where its keys belong.
        network: What else decides whether it is reached.
        open: The file system; raises ImportError without the package, NoAccount.
    """

    extra: str
    package: str
    bucket: str
    keys: str
    network: str
    open: Callable[[], Any]

    @property
    def address(self) -> str:
        """How its addresses look."""
        return f"{self.extra}://{self.bucket}/prefix"


CLOUDS = {
    cloud.extra: cloud
    for cloud in (
        Cloud(
            extra="s3",
            package="s3fs",
            bucket="bucket",
            keys="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)",
            network="AWS_ENDPOINT_URL and AWS_DEFAULT_REGION",
            open=_s3,
        ),
        Cloud(
            extra="gs",
            package="gcsfs",
            bucket="bucket",
            keys="GOOGLE_APPLICATION_CREDENTIALS (a file), or `gcloud auth application-default login`",
            network="the project's billing",
            open=_gs,
        ),
        Cloud(
            extra="abfs",
            package="adlfs",
            bucket="container",
            keys="AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and its key or a login",
            network="the account's name and firewall",
            open=_abfs,
        ),
    )
}
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "NoAccount",
)
_ERRORS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "azure.core.exceptions": ("AzureError",),
}


def library_errors() -> tuple[type[BaseException], ...]:
    """The errors of the loaded libraries that are not those of the system."""
    found: list[type[BaseException]] = [NoAccount]
    for module, names in _ERRORS.items():
        found += [getattr(sys.modules[module], name) for name in names if module in sys.modules]
    return tuple(found)


def error_code(error: BaseException) -> str:
    """What the server called it, or its number; "" where that is not known."""
    of_server = error.__cause__ or error
    named = getattr(of_server, "response", None)
    if isinstance(named, dict):  # Amazon's
        return named.get("Error", {}).get("Code", "")
    for name in ("error_code", "status_code", "code"):
        if value := getattr(of_server, name, None):
            return str(getattr(value, "value", value))
    return "Forbidden" if str(error).startswith("Forbidden") else ""


def is_refusal(error: BaseException, code: str) -> bool:
    """Whether the server knows this machine and does not let it, or does not know it."""
    of_server = error.__cause__ or error
    is_named_so = type(of_server).__name__ == "ClientAuthenticationError" or code in ("401", "403", "Forbidden")
    return isinstance(error, PermissionError) or is_named_so or getattr(of_server, "status_code", None) in (401, 403)
