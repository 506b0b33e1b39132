"""No secret in a text that leaves the process."""

import base64
import json
import logging
import re
import sys
import time
from urllib.parse import quote

import pytest
from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
from detect_secrets.plugins.base import RegexBasedDetector
from detect_secrets.plugins.basic_auth import BasicAuthDetector
from hypothesis import HealthCheck, assume, given, settings
from hypothesis.strategies import from_regex

from mllm_assets.errors import SourceError
from mllm_assets.redaction import holds_secret, redacted, redacted_output, redacted_value
from mllm_assets.worker.launch import WorkerCrashed

TOKEN = "hf_" + "aB3" * 12
JWT = ".".join(["eyJhbGciOiJIUzI1NiJ9", "eyJzdWIiOiIxMjM0In0", "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"])
# what finds nothing of a secret's own shape, but words, entropy, or addresses that are not secret
UNSPECIFIC = {
    "ArtifactoryDetector", "CloudantDetector", "IbmCloudIamDetector", "IbmCosHmacDetector", "IPPublicDetector",
    "SoftlayerDetector",
}  # fmt: skip


def detectors() -> list[RegexBasedDetector]:
    """The kept list of secrets' shapes."""
    classes = [value for value in get_mapping_from_secret_type_to_class().values()]
    found = [value() for value in classes if issubclass(value, RegexBasedDetector)]
    return [detector for detector in found if type(detector).__name__ not in UNSPECIFIC]


@pytest.mark.parametrize("detector", detectors(), ids=lambda detector: type(detector).__name__)
@pytest.mark.not_fast
def test_every_shape_that_detect_secrets_knows_is_not_shown(detector: RegexBasedDetector) -> None:
    for pattern in detector.denylist:
        ascii_only = re.compile(pattern.pattern, (pattern.flags & ~re.UNICODE) | re.ASCII)

        @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(from_regex(ascii_only, fullmatch=True))
        def is_hidden(secret: str) -> None:
            # a quote ends an address in JSON and in Python, so that what follows is not its password
            assume(not isinstance(detector, BasicAuthDetector) or not set(secret) & set("'\""))
            text = redacted(f"it was {secret} here")
            assert not set(detector.analyze_string(text)), (secret, text)

        is_hidden()


@pytest.mark.parametrize(
    "name",
    [
        "PRIVATE_KEY", "SSH_PRIVATE_KEY", "KEY_PASSPHRASE", "AZURE_STORAGE_CONNECTION_STRING", "STORAGE_KEY", "DB_PASS",
        "MYSQL_PWD", "AZURE_SAS", "SENTRY_DSN", "SESSION_COOKIE", "SIGNING_KEY_BASE64", "GITHUB_JWT", "API_KEY_2",
        "NPM_AUTH", "DB_CONN_STR", "DBPASS", "APPPWD", "CLIENTKEY", "SECRET_KEY_BASE", "HF_TOKEN_PROD", "github_token",
        "GH_PAT", "DB_CREDS", "AZURE_CLIENT_SECRET_VALUE",
    ],
)  # fmt: skip
def test_a_secret_of_the_environment_is_named_in_every_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = 'pa"ss/w+rd\nof a second line that is long'
    monkeypatch.setenv(name, value)
    packed = base64.b64encode(value.encode()).decode()
    forms = [
        value,
        json.dumps(value),
        repr(value),
        packed,
        packed.rstrip("="),
        quote(value),
        "of a second line that is long",
    ]
    for form in forms:
        assert redacted(f"<{form}>").strip("<>='\"") == name, form


@pytest.mark.parametrize(
    "name",
    [
        "PWD",
        "OLDPWD",
        "KEYBOARD",
        "MONKEY",
        "PATH",
        "XAUTHORITY",
        "TOKENIZERS_PARALLELISM",
        "COMPASS",
        "GIT_ASKPASS",
        "SSH_AUTH_SOCK",
    ],
)
def test_an_ordinary_variable_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/an/ordinary/value")
    assert redacted("in /an/ordinary/value") == "in /an/ordinary/value"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"401 for {TOKEN}.", "401 for [secret]."),
        ("s3://AKIAABCDEFGHIJKLMNOP/x", "s3://[secret]/x"),
        ("https://me:pass/word@hub.test/a".replace("/word", "word"), "https://hub.test/a"),
        ("postgresql+psycopg2://dagster:secret1@db:5432/d", "postgresql+psycopg2://db:5432/d"),
        ("postgresql://u:pa/ss@w0rd1@db/x", "postgresql://db/x"),
        ("https://tokenonly1234567@host/x", "https://host/x"),
        ("https://a:b@one.test/x,https://c:d@two.test/y", "https://one.test/x,https://two.test/y"),
        ("http://127.0.0.1:3000/runs/a@b and ssh://git@github.com/a/b", None),
        ("postgresql://dagster@db/dagster", None),
        ("The secret: ingredient is love", None),
        ("password : none was given. A secret: patience!", None),
        ("The password: hunter2hunter", "The password: [secret]"),
        ("secret: correcthorsebatterystaple", "secret: [secret]"),
        ("password=abc", "password=[secret]"),
        ("my_secret: abc", "my_secret: [secret]"),
        ('{"secret": "abc"}', '{"secret": "[secret]"}'),
        ("https://hooks.slack.com/services/T0/B0/xyz", "https://hooks.slack.com/services/[secret]"),
        ("argument 'hub_token=abc'", "argument 'hub_token=[secret]'"),
        ('{"swanlab_api_key": "abc"}', '{"swanlab_api_key": "[secret]"}'),
        ("hub_token=null", "hub_token=null"),
        ("export SERVE_API_KEY=$(openssl rand -hex 24)", None),
        ("eos_token: <end_of_turn>, num_tokens=12", "eos_token: <end_of_turn>, num_tokens=12"),
        ("see https://huggingface.co/settings/tokens", "see https://huggingface.co/settings/tokens"),
        ("Authorization: Bearer abcdefgh12345678", "Authorization: Bearer [secret]"),
        ("{'Authorization': 'Basic dXNlcjpwYXNz'}", "{'Authorization': 'Basic [secret]'}"),
        ('{\\"authorization\\": \\"Bearer abcdefgh12345678\\"}', '{\\"authorization\\": \\"Bearer [secret]\\"}'),
        ("sent with bearer abcd1234efgh", "sent with bearer [secret]"),
        ("the bearer of good news, a basic question", None),
        ("Cookie: session=abcdef", "Cookie: [secret]"),
        ("cookie: a=b; s=hunter2x", "cookie: [secret]"),
        ("Server=a;Uid=u;Pwd=hunter2x;", "Server=a;Uid=u;Pwd=[secret];"),
        ("dbpass: hunter2x", "dbpass: [secret]"),
        ("run --token hunter2hunter2 -v", "run --token [secret] -v"),
        ("machine h login u password hunter2x", "machine h login u password [secret]"),
        ("https://h/x?token=hunter2hunter2&x=1", "https://h/x?token=[secret]&x=1"),
        ("'token': 'hunter2hunter2'", "'token': '[secret]'"),
        ("token: <end_of_turn>, token=word, the --token option, password -> text", None),
        ("password%3Dhunter2x", "password%3D[secret]"),
        ("password\\u003dhunter2x", "password\\u003d[secret]"),
        ("with gsk_abcdefghijklmnopqrstuvwx", "with [secret]"),
        ("x-api-key: abc123", "x-api-key: [secret]"),
        (f"got {JWT}.", "got [secret]"),
        (
            "https://a.blob.core.windows.net/c?sv=2024&sig=a%2Fb%3Dcdefgh&se=1",
            "https://a.blob.core.windows.net/c?sv=2024&sig=[secret]&se=1",
        ),
        (
            "https://b.s3.test/k?X-Amz-Credential=ABCDEFGH%2F2026&X-Amz-Signature=0123456789abcdef",
            "https://b.s3.test/k?X-Amz-Credential=[secret]&X-Amz-Signature=[secret]",
        ),
        (
            "https://c.test/k\\u0026X-Goog-Signature=0123456789abcdef",
            "https://c.test/k\\u0026X-Goog-Signature=[secret]",
        ),
        ("AccountName=x;AccountKey=abc/def+ghi==;EndpointSuffix=y", "AccountName=x;AccountKey=[secret]"),
        ('password: "correct horse battery"', 'password: "[secret]"'),
        ('{\\"db_password\\": \\"a b\\", \\"x\\": 1}', '{\\"db_password\\": \\"[secret]\\", \\"x\\": 1}'),
        ("private_key=abc passphrase=def", "private_key=[secret] passphrase=[secret]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----\nafter", "[secret]\nafter"),
        ("sort_key=name, partition_key: day, image_token=<image>, design=1", None),
        ("hf_home and a digest 4be1c2d3e4f5a6b7c8d9e0f1a2b3c4d5e6f7a8b9", None),
    ],
)
def test_what_looks_like_a_secret_is_not_shown(text: str, shown: str | None) -> None:
    assert redacted(text) == (shown or text)


@pytest.mark.attack("secrets")
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            'Authorization: Digest username="me", realm="r", response="6629fae49393a053"',
            "Authorization: [secret]",
        ),
        ('authorization: Hawk id="x", mac="j4h3g2jj4h3g2"', "authorization: [secret]"),
        ("Authorization: AWS4-HMAC-SHA256 SignedHeaders=host", "Authorization: [secret]"),
        ("<password>a b</password>", "<password>[secret]</password>"),
        ("<s:Password type='x'>ab</s:Password>", "<s:Password type='x'>[secret]</s:Password>"),
        ("<SecretAccessKey>ab/c</SecretAccessKey>", "<SecretAccessKey>[secret]</SecretAccessKey>"),
        ("<password><![CDATA[a<b]]></password>", "<password>[secret]<b]]></password>"),
        ('<add key="ApiKey" value="ab" />', '<add key="ApiKey" value="[secret]" />'),
        ('<entry key="db.password">ab</entry>', '<entry key="db.password">[secret]</entry>'),
        ("curl -sSu me:plain https://h", "curl -sSu me:[secret] https://h"),
        ("curl -u 'me:hunter2' https://h", "curl -u 'me:[secret]' https://h"),
        ("tool --proxy-user=me:h23 x", "tool --proxy-user=me:[secret] x"),
        ("--password hunter2 --hf-token 'a cd'", "--password [secret] --hf-token '[secret]'"),
        ("['login', '--db_password', 'hunter2']", "['login', '--db_password', '[secret]']"),
        ("wget --ftp-password hunter2", "wget --ftp-password [secret]"),
        ("--secret-key=a1b2", "--secret-key=[secret]"),
        ("mysql -u me -phunter2 db", "mysql -u me -p[secret] db"),
        ("docker login -u me -p hunter h", "docker login -u me -p [secret] h"),
        ("sshpass -p hunter ssh h", "sshpass -p [secret] ssh h"),
        ("redis-cli -h h -a hunter", "redis-cli -h h -a [secret]"),
        ("openssl rsa -passin pass:hunter", "openssl rsa -passin pass:[secret]"),
        ("ENV DB_PASSWORD hunter2", "ENV DB_PASSWORD [secret]"),
        ("requirepass hunter2", "requirepass [secret]"),
        ("to me:hunter2@db.test:5432/x", "to me:[secret]@db.test:5432/x"),
        ("me:words@tcp(db:3306)/d", "me:[secret]@tcp(db:3306)/d"),
        ("jdbc:oracle:thin:me/words@db:1521", "jdbc:oracle:thin:me/[secret]@db:1521"),
        ("machine h account a password hunter", "machine h account a password [secret]"),
        ("machine h\n  password ab1\n  login me", "machine h\n  password [secret]\n  login me"),
        ("default login me password hunter", "default login me password [secret]"),
        ("db.test:5432:shop:me:hunter", "db.test:5432:shop:me:[secret]"),
        ("read *:*:*:me:a/b from", "read *:*:*:me:[secret] from"),
        ("AccountKey=abc/def+ghi==", "AccountKey=[secret]"),
        ('"private_key_id": "0123456789abcdef"', '"private_key_id": "[secret]"'),
        ('{"auth": "dXNlcjpwYXNz"}, _auth=dXNlcg', '{"auth": "[secret]"}, _auth=[secret]'),
        ("IDENTIFIED BY 'a b'", "IDENTIFIED BY '[secret]'"),
        (
            "X-Vault-Token: ab, Ocp-Apim-Subscription-Key: ab",
            "X-Vault-Token: [secret], Ocp-Apim-Subscription-Key: [secret]",
        ),
        ("mllm-assets generate -p 'What is this?', pytest -p no:cacheprovider, docker run -p 80:80 -u 1000:1000", None),
        ("docker run --user $(id -u):$(id -g), python -u app:main, --token $HF_TOKEN, --pad_token <pad>", None),
        ("python:3.11-slim@sha256:0123456789abcdef, x:emoji_sft@v2, 10:45@noon, mailto:me@mail.test", None),
        ("see a.py:1234:5:E501:line, at 2026:1129:16:22:08, aa:bb:cc:dd:ee:ff, fe80:1234:1:2:3", None),
        ("machine learning password store, the default password policy, set password to use it", None),
        ("<answer>left</answer> <token> </token>, auth: none, the --token option", None),
    ],
)
def test_a_secret_of_a_command_a_file_or_a_header_is_not_shown(text: str, shown: str | None) -> None:
    """Each was printed whole: a header of several values, XML, options, `name:password@host`, .netrc and .pgpass."""
    assert redacted(text) == (shown or text)


def test_values_of_the_environment_are_named_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a/b+c=defgh")
    monkeypatch.setenv("SHORT_TOKEN", "a")  # would be found in every word
    monkeypatch.setenv("TEAMS_WEBHOOK_URL", "https://chat.test/hooks/abcdef")
    monkeypatch.setenv("PGPASS", "elephants")
    assert redacted("at https://chat.test/hooks/abcdef with elephants") == "at TEAMS_WEBHOOK_URL with PGPASS"
    assert redacted("key 0123456789abcdef, a/b+c=defgh, a%2Fb%2Bc%3Ddefgh") == (
        "key WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, AWS_SECRET_ACCESS_KEY"
    )
    assert redacted_value({"a": [TOKEN, 1, None], "b": 0.5}) == {"a": ["[secret]", 1, None], "b": 0.5}
    assert holds_secret({"a": [{"b": "0123456789abcdef"}]}) and not holds_secret({"a": ["b", 1, None]})


def test_errors_and_crashes_show_no_secret() -> None:
    assert str(SourceError(f"no access with {TOKEN}")) == "no access with [secret]"
    assert str(WorkerCrashed(f"Traceback: {TOKEN}")) == "Traceback: [secret]"


def test_prints_and_logs_are_redacted_and_the_streams_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    streams = sys.stdout, sys.stderr
    with redacted_output():
        print("printed", TOKEN)
        sys.stderr.writelines([f"written {TOKEN}\n"])
        handler = logging.StreamHandler()
        logger = logging.getLogger("library")
        logger.addHandler(handler)
        logger.warning("logged %s", TOKEN)
        logger.removeHandler(handler)
    assert (sys.stdout, sys.stderr) == streams
    shown = "".join(capfd.readouterr())
    assert TOKEN not in shown and shown.count("[secret]") == 3


@pytest.mark.parametrize(
    "text",
    [
        "eyJ" * 30_000,
        "BEGIN " * 20_000,
        "-" * 50_000,
        "key" * 30_000,
        "bearer " * 20_000,
        "a:" * 50_000,
        "<a " * 30_000,
        "machine a login " * 9_000,
        "--a-" * 30_000,
        "mysql " * 20_000,
        "a" * 99_999 + "@",
        "\x27, \x27" * 20_000,
    ],
)
def test_a_long_text_takes_no_time(text: str) -> None:
    started_s = time.process_time()
    redacted(text)
    assert time.process_time() - started_s < 2
