"""Remove secrets from every text that leaves a process: messages, logs, metadata, model cards.

What counts: the values of environment variables that are named like a secret, what has the form of a well-known
token, the user of an address, and the value of a setting that is named like a secret. A secret shorter than
`MIN_CHARS`, or split when printed, is not recognised.
"""

import base64
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TextIO
from urllib.parse import quote, quote_plus

MIN_CHARS = 8  # a shorter value would be found inside ordinary words
REDACTED = "[secret]"

_KEYS = (
    "api access account auth client database db encryption host license master private service shared shared_?access "
    "sign signing ssh storage subscription"
).split()
_TOKENS = "access api app auth bearer deploy hub id identity job private refresh security session vault".split()
_NAMED_LIKE_A_SECRET = re.compile(
    rf"(?i)(?:TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|PASSCODE|(?<!COM)(?<!BY)(?<!ASK)PASS|(?!^)(?<!OLD)PWD"
    rf"|(?:_|{'|'.join(_KEYS)}|priv|secret)KEY|WEBHOOK(?:_UR[LI])?|_HOOK|CRED(?:ENTIAL)?S?|JWT|_PAT|BEARER|AUTHORIZATION"
    r"|COOKIE|SIGNATURE|_SAS|_AUTH|AUTH_CONFIG|DSN|CONN(?:ECTION)?_?STR(?:ING)?)"
    r"(?:_?(?:\d+|V\d+|BASE64|B64|BASE|VALUE|JSON|PROD(?:UCTION)?|STAGING|DEV|TEST|READ|WRITE|OLD|NEW|MAIN))?$"
    r"|^PGPASS(?!FILE$)"  # Postgres' own; the file's is a path
)
# the shapes of well-known tokens, as detect-secrets keeps them (a test compares)
_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|(?:A3T[A-Z0-9]|ABIA|ACCA|AKIA|ASIA)[A-Z0-9]{16}"  # AWS access key id
    r"|\bsk-[A-Za-z0-9_-]{20,}"  # OpenAI and others
    r"|(?:gh[pousr]_|github_pat_|gl[a-z]{2,5}-|GR1348941)[A-Za-z0-9_-]{20,}"  # GitHub, GitLab
    r"|(?i:xox[a-z]-\d+-)[A-Za-z0-9-]+|xox[abeprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|(?<=(?i:hooks\.slack\.com/services/))[A-Za-z0-9/_]+"
    r"|\bAIza[A-Za-z0-9_-]{35}"  # Google
    r"|[rs]k_(?:live|test)_[A-Za-z0-9]{24,}|sq0csp-[\w\\-]{43,}"  # Stripe, Square
    r"|SG\.[\w-]{22}\.[\w-]{43}|[0-9a-z]{32}-us[0-9]{1,2}|(?:AC|SK)[a-z0-9]{32}"  # SendGrid, Mailchimp, Twilio
    r"|npm_[A-Za-z0-9]{36}|(?<=:_authToken=)\S+|pypi-[A-Za-z0-9_-]{50,}"  # registries
    r"|[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27}|\b\d{8,10}:[0-9A-Za-z_-]{35}"  # Discord, Telegram
    r"|\b(?:ya29\.|dckr_pat_|r8_|gsk_|shp(?:at|ca|pa|ss)_|do[opr]_v1_|hv[sb]\.|nvapi-|xai-|pplx-|lin_api_|api_org_|GOCSPX-"
    r"|AGE-SECRET-KEY-1)[A-Za-z0-9_-]{20,}"  # others of models, registries and clouds
    r"|(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]+=*\.[A-Za-z0-9_-]+=*(?:\.[A-Za-z0-9_.+/=-]*)?"  # JSON web tokens
    r"|-{0,5}(?:BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY|PuTTY-User-Key-File)"
    r"[\s\S]*?(?:END [A-Z0-9 ]{0,30}PRIVATE KEY[A-Z ]*-{0,5}|\Z)"
)
# what signs an address: Azure's SAS, and what Amazon, Google and CloudFront put into a presigned one
_SIGNED = re.compile(
    r"(?i)(?<![a-z0-9])(?P<before>(?:sig|(?:x-(?:amz|goog)-)?(?:signature|credential|security-token)|awsaccesskeyid"
    r"|key-pair-id)(?:=|%3D))[^&\s'\"\\]{6,}"
)
_OPTIONS = (
    r"(?:[\w-]{0,40}[_-])?"
    rf"(?:pass(?:word|wd|phrase)?|pwd|token|secret|(?:{'|'.join(_KEYS)}|secret)[_-]?(?:key|token))"
)
# what follows an option (in a list of arguments too), a variable of Docker or csh, or such a name in an address
_SAID = re.compile(
    rf"(?i)(?P<before>(?<![^\s'\"])--?{_OPTIONS}(?:['\"],\s*|[ =]\s*)(?P<quote>['\"])?"
    rf"|\b(?:env|arg|setenv|set|export)\s+\w{{0,40}}password\s+|\b(?:requirepass|masterauth)\s+"
    r"|(?P<sure>;\s*(?:pwd|pass)=|[?&](?:token|auth|code|key|pwd|pass)=))(?P<value>(?![$<])(?(quote)[^'\"\n]+|[^\s&;'\"]{4,}))"
)
# where a value alone is a password: a line of .netrc or .pgpass, commands, SQL
_SPOKEN = re.compile(
    r"(?i)(?P<before>\b(?:machine\s+\S+|default)(?:\s+(?:login|account)\s+\S+)+\s+password\s+"
    r"|\bmachine\s+\S+\s+password\s+(?=\S+\s+(?:login|account)\s)"
    r"|(?:^|(?<=[\s'\"]))(?=[^\s:'\"]{0,100}[a-z*.])[^\s:'\"]{1,100}:(?:\d{4,5}|\*):(?:(?!\d+:)[^\s:'\"]+:){2}(?!//)(?![0-9a-f:]+(?!\S))"
    r"|(?:(?<!\S)-u|(?<!\S)--(?:proxy-)?user[ =])\s*['\"]?(?!\d+:\d)[^\s:'\"$-][^\s:'\"]*:(?!//|[a-z]+(?![^\s,.]))"
    r"|\bcurl\b[^\n;|&]{0,200}?\s-[a-z]*u\s*['\"]?[^\s:'\"$-][^\s:'\"]*:(?!//)"
    r"|\b(?:sshpass|mysql\w*|mariadb\S*|(?:docker|podman|helm|registry|az)\s+login)\b[^\n;|&]{0,200}?\s-p\s*"
    r"|\bredis-cli\b[^\n;|&]{0,200}?\s(?:-a|--pass)\s+|(?<=\s)-pass(?:in|out)\s+pass:"
    r"|\b(?:identified\s+by|password)[\s(]+(?P<quote>['\"])|\bjdbc:oracle:\w+:\w+/)"
    r"(?!['\"\[$])(?P<value>(?(quote)[^'\"\n]+|[^\s'\"@]{3,}))"
)
# <password>...</password>, and an element that another names by an attribute
_ELEMENT = re.compile(
    rf"(?i)(?P<before><(?:[\w.-]+:)?(?:[\w.-]{{0,40}}(?:{'|'.join(_KEYS)}|secret|access)[_-]?(?:key|token)(?:id)?|"
    r"[\w.-]{0,40}(?:password|passwd|passphrase|secret|session_?token))(?:\s[^<>]{0,200})?>"
    r"|<\w+\s[^<>]{0,200}?\b(?:key|name)=['\"][^'\"<>]{0,40}(?:password|secret|(?:api|access|private)_?key|token)['\"]"
    r"(?:\s*>|\s+value=['\"]))(?:<!\[CDATA\[)?(?!\[secret\])[^<>\"']+(?:]]>)?"
)
# name:password@host without a scheme; name:tag@sha256 is an image, and mailto: one of many words before an address
_USER_AT_HOST = re.compile(
    r"(?<![\w:/.@%+-])(?P<before>[A-Za-z_][\w.+-]{0,60}:)(?P<value>[^\s@:/'\",]{3,100})"
    r"(?P<after>@(?!sha\d+:|md5:)[A-Za-z0-9][\w.-]*(?P<place>:\d|\(|/|::)?)"
)
_COOKIE = re.compile(r"(?i)(?P<before>\bcookie(?::\s*|=))[^\r\n'\"]+")
# Digest, Hawk, OAuth, AWS4-HMAC-SHA256: a list of names and values, of which several are secret
_HEADER_OF_PAIRS = re.compile(
    r"(?i)(?P<before>\bauthorization\\*['\"]?\s*[:=]\s*\\*['\"]?)[a-z0-9-]+\s+\w+\s*=[^\r\n]+"
)
_AWS_SECRET = re.compile(r"(?i)(?P<before>aws.{0,80}?['\"])[0-9a-z/+]{40}(?=['\"])")
_HEADER = re.compile(
    r"(?i)(?P<before>\b(?:authorization\\*['\"]?\s*[:=]\s*\\*['\"]?(?:[a-z]+\s+)?|(?:set-)?cookie:\s*"
    r"|(?P<prose>(?:bearer|basic)\s+)))(?!\[secret\])(?P<value>[^\s'\",}\\]{6,})"
)
# https://name:password@host; a password may hold / and @, but what begins as a port does is one: http://host:80/a@b
_USER_OF_ADDRESS = re.compile(r"(?<=://)[^\s/@:'\"]*:(?!\d{1,5}/)(?:(?!://)[^\s'\"])*@")
_TOKEN_OF_ADDRESS = re.compile(r"(?<=://)([^\s/@:'\"]+)@")  # https://token@host
_SETTING = re.compile(
    rf"(?i)(?P<before>\b(?P<name>\w*(?:(?:{'|'.join(_KEYS)})[_-]?key|(?:{'|'.join(_TOKENS)})[_-]?token|password|passwd"
    r"|passphrase|secret(?:[_-]?key(?:_base)?|_value)?|_pwd|(?:_|db|key)pass|connection[_-]?string|private_key_id"
    r"|\b_auth|\b(?:auth|pass)(?=\\*['\"]?\s*[:=]\s*\\*['\"])|\btoken))"
    r"(?P<sign>\\*['\"]?\s*(?::=|=>|[=:]|%3D|\\+u003d)\s*)"
    r"(?P<open>\\*['\"])?)(?!null|None|\[secret\]|\$[({])(?P<value>(?(open)(?:(?!\\*['\"])[^\n])+|[^\s'\",}]+))"
)
_PLAIN_WORDS = {"password", "passphrase", "secret"}  # prose has these too: "The secret: patience"


def environment_secrets() -> dict[str, str]:
    """Name -> value of the variables that hold a secret."""
    return {
        name: value.strip()
        for name, value in os.environ.items()
        if _NAMED_LIKE_A_SECRET.search(name) and len(value.strip()) >= MIN_CHARS
    }


def redacted(text: str) -> str:
    """A text with the variable's name instead of a secret value, and `[secret]` instead of what looks like a token."""
    for name, value in environment_secrets().items():
        for form in _forms(value):
            text = text.replace(form, name)
    text = _SAID.sub(_without_said, text)
    text = _USER_AT_HOST.sub(_without_password, text)
    for shape in (_SPOKEN, _ELEMENT, _AWS_SECRET, _COOKIE, _HEADER_OF_PAIRS):
        text = shape.sub(rf"\g<before>{REDACTED}", text)
    text = _SIGNED.sub(rf"\g<before>{REDACTED}", _HEADER.sub(_without_header, text))
    text = _USER_OF_ADDRESS.sub("", _TOKEN.sub(REDACTED, text))
    text = _TOKEN_OF_ADDRESS.sub(lambda found: "" if _looks_random(found[1]) else found[0], text)
    return _SETTING.sub(_without_value, text)


@lru_cache(256)
def _forms(value: str) -> list[str]:
    """How a value is written: as it is, in an address, in JSON, base64 and hex, and line by line; the longest first."""
    data = value.encode("utf-8", "surrogateescape")
    packed = {base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()}
    packed |= {text.rstrip("=") for text in packed}
    lines = {line for line in value.splitlines() if len(line) >= 2 * MIN_CHARS}  # such as those of a private key
    forms = {value, quote(data), quote(data, safe=""), quote_plus(data), json.dumps(value)[1:-1], repr(value)[1:-1]}
    forms |= {data.hex(), data.hex().upper()}
    return sorted(forms | packed | lines, key=len, reverse=True)


def _without_said(found: re.Match[str]) -> str:
    is_word = not found["sure"] and re.fullmatch(r"[a-z]+[.,;:!?)]*", found["value"])  # "the --token option"
    return found[0] if is_word else found["before"] + REDACTED


def _without_password(found: re.Match[str]) -> str:
    is_word = re.fullmatch(r"[A-Za-z._-]+", found["value"]) and not found["place"]  # "author:me@mail.test"
    return found[0] if is_word or found["value"].isdigit() else found["before"] + REDACTED + found["after"]


def _without_header(found: re.Match[str]) -> str:
    return found[0] if found["prose"] and not _looks_random(found["value"]) else found["before"] + REDACTED


def _without_value(found: re.Match[str]) -> str:
    prose = (
        found["name"].lower() in _PLAIN_WORDS and not found["open"] and re.fullmatch(r"\s*:\s+|\s+=\s+", found["sign"])
    )
    may_be_word = prose or found["name"].lower() in ("token", "auth", "pass")  # "token: <eos>", quoted or not
    least = MIN_CHARS if found["name"].lower() == "token" else 6  # of which ids and versions are printed
    return found[0] if may_be_word and not _looks_random(found["value"], least) else found["before"] + REDACTED


def _looks_random(value: str, least: int = MIN_CHARS) -> bool:
    """Whether a text is not a word or a name: long, or with digits, signs or capitals inside."""
    value = value.rstrip(".,;:!?)")
    return len(value) >= least and bool(re.search(r"\d|[a-z][A-Z]|[!#$%&*+=?@^~]|.{20}", value))


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
