"""How the facts of an asset are kept in Dagster: what fits its page as itself, what is wider in one window."""

import json
from collections.abc import Mapping
from typing import Any

import dagster as dg

from mllm_assets.components.reporting import WINDOW_CHARS, in_window

DETAILS = "details"
# Dagster breaks a value at spaces only, and its column is 276 px wide on a page of 1280 px: 32 characters
MAX_WORD_CHARS = 31
MAX_LINES = 6  # of JSON between the other rows
_BEGIN, _END = "```json\n", "\n```"


def fitted(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of which nothing is wider than its column: what is goes, whole, into the window `details`.

    The paths and digests there are for programs too: `facts_of` gives them back. A wide link stays one as well.
    """
    details = {name: _plain(value) for name, value in metadata.items() if _is_wide(value)}
    links = {
        name: dg.MetadataValue.md(f"[open](<{value.url}>)")
        for name, value in metadata.items()
        if name in details and isinstance(value, dg.UrlMetadataValue)
    }
    shown = {name: links.get(name, value) for name, value in metadata.items() if name in links or name not in details}
    if not details:
        return shown
    return {**shown, DETAILS: in_window(_BEGIN + json.dumps(details, indent=2, ensure_ascii=False) + _END)}


def facts_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The values of metadata as they were before `fitted`; what older versions recorded is read alike."""
    values = {name: getattr(value, "value", value) for name, value in metadata.items()}
    if isinstance(text := values.get(DETAILS), str) and text.startswith(_BEGIN):
        del values[DETAILS]
        values |= json.loads(text.removeprefix(_BEGIN).rpartition(_END)[0])
    return values


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _is_wide(value: Any) -> bool:
    if isinstance(value, dg.MetadataValue) and not isinstance(
        value, dg.TextMetadataValue | dg.PathMetadataValue | dg.UrlMetadataValue | dg.JsonMetadataValue
    ):
        return False
    plain = _plain(value)
    if isinstance(plain, dict | list):
        if len(json.dumps(plain)) >= WINDOW_CHARS:
            return False
        lines = json.dumps(plain, indent=2, ensure_ascii=False).splitlines()
        widths = [len(line) - len(line.lstrip()) + _longest_word(line) for line in lines]
        return len(lines) > MAX_LINES or max(widths) > MAX_WORD_CHARS
    return isinstance(plain, str) and _longest_word(plain) > MAX_WORD_CHARS


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def as_texts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A check's figures as rounded texts: Dagster plots every number of a check, after the first as a lone point."""
    return {name: _as_text(value) for name, value in metadata.items()}


def _as_text(value: Any) -> Any:
    number = _plain(value)
    if isinstance(number, float):
        return f"{number:z.5g}"
    return str(number) if isinstance(number, int) and not isinstance(number, bool) else value
