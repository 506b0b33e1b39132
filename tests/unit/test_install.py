"""What pip is set to, uv is told."""

import runpy
from pathlib import Path

settings = runpy.run_path(str(Path(__file__).parents[2] / ".ci" / "install.py"))["uv_settings"]


def test_index_certificates_links_and_constraints_of_pip_are_handed_on() -> None:
    listed = """:env:.cert='/etc/corporate.crt'
global.cert='/etc/other.crt'
global.constraint='/etc/pins.txt'
global.extra-index-url='file:///a/simple https://b/simple'
global.find-links='/wheels\\n/more'
global.index-url='https://user:p=ss@mirror/simple'
global.timeout='180'
"""
    assert settings(listed) == {
        "SSL_CERT_FILE": "/etc/corporate.crt",
        "UV_CONSTRAINT": "/etc/pins.txt",
        "UV_INDEX": "file:///a/simple https://b/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_DEFAULT_INDEX": "https://user:p=ss@mirror/simple",
    }


def test_pip_without_settings_leaves_uv_to_its_own() -> None:
    assert settings("") == {} and settings("global.no-index='false'\n") == {}
