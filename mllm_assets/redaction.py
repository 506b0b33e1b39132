"""Secrets out of every text that leaves a process: messages, logs, metadata, model cards.

What counts: the values of environment variables that are named like a secret, what has the form of a well-known
token, the user of an address, and the value of a setting that is named like a secret. A secret shorter than
`MIN_CHARS`, or cut in two by whoever printed it, is not recognised.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO
from urllib.parse import quote

MIN_CHARS = 8  # a shorter value would be found inside ordinary words
REDACTED = "[secret]"

_NAMED_LIKE_A_SECRET = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|WEBHOOK(?:_UR[LI])?|CREDENTIALS?)$"
    r"|^PGPASS(?!FILE$)"  # Postgres' own; the file's is a path
)
_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS access key id
    r"|\bsk-[A-Za-z0-9_-]{20,}"  # OpenAI and others
    r"|\b(?:gh[pousr]_|github_pat_|glpat-)[A-Za-z0-9_-]{20,}"  # GitHub, GitLab
    r"|\bxox[abeprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|(?<=hooks\.slack\.com/services/)[A-Za-z0-9/]+"
)
# https://name:password@host; a password may hold / and @, but what begins as a port does is one: http://host:80/a@b
_USER_OF_ADDRESS = re.compile(r"(?<=://)[^\s/@:'\"]*:(?!\d{1,5}/)(?:(?!://)[^\s'\"])*@")
_TOKEN_OF_ADDRESS = re.compile(r"(?<=://)([^\s/@:'\"]+)@")  # https://token@host
_SETTING = re.compile(
    r"(?i)(?P<before>\b(?P<name>\w*(?:hub_token|api_key|password|secret|access_key))(?P<sign>['\"]?\s*[=:]\s*['\"]?))"
    r"(?!null|None|\[secret\]|\$[({])(?P<value>[^\s'\",}]+)"
)
_PLAIN_WORDS = {"password", "secret"}  # prose has these too: "The secret: patience"


def environment_secrets() -> dict[str, str]:
    """Name -> value of the variables that hold a secret."""
    return {
        name: value.strip()
        for name, value in os.environ.items()
        if _NAMED_LIKE_A_SECRET.search(name) and len(value.strip()) >= MIN_CHARS
    }


def redacted(text: str) -> str:
    """A text in which a variable's name stands for its secret value, and `[secret]` for what looks like a token."""
    for name, value in environment_secrets().items():
        for form in {value, quote(value, safe="")}:
            text = text.replace(form, name)
    text = _USER_OF_ADDRESS.sub("", _TOKEN.sub(REDACTED, text))
    text = _TOKEN_OF_ADDRESS.sub(lambda found: "" if _looks_random(found[1]) else found[0], text)
    return _SETTING.sub(_without_value, text)


def _without_value(found: re.Match[str]) -> str:
    prose = found["name"].lower() in _PLAIN_WORDS and re.fullmatch(r"\s*:\s+|\s+=\s+", found["sign"])
    return found[0] if prose and not _looks_random(found["value"]) else found["before"] + REDACTED


def _looks_random(value: str) -> bool:
    """Whether a text is no word or name of people: long, or with digits, signs or capitals inside."""
    value = value.rstrip(".,;:!?)")
    return len(value) >= MIN_CHARS and bool(re.search(r"\d|[a-z][A-Z]|[!#$%&*+=?@^~]|.{20}", value))


def redacted_value(value: Any) -> Any:
    """The same for the texts in a JSON-able value."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {key: redacted_value(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return [redacted_value(item) for item in value]
    return value


def holds_secret(value: Any) -> bool:
    """Whether a JSON-able value holds the form of a token, a password in an address, or a secret of the environment."""
    if isinstance(value, Mapping):
        return any(holds_secret(item) for item in value.values())
    if type(value) in (list, tuple):
        return any(holds_secret(item) for item in value)
    return isinstance(value, str) and redacted(value) != value


class _RedactedStream:
    """A text stream whose writes are redacted; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def redacted_output() -> Iterator[None]:
    """Redact what Python code of this process prints and logs, libraries included."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_RedactedStream(stream) for stream in streams)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
