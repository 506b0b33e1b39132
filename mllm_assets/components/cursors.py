"""What a sensor remembers from tick to tick: JSON with a version, so that a later form can tell that it is older."""

import json
from typing import Any

CURSOR_VERSION = 1


def read_cursor(text: str | None) -> dict[str, Any]:
    """What was remembered; nothing of another version, or of what is no cursor of ours."""
    try:
        cursor = json.loads(text or "{}")
    except ValueError:
        return {}
    if not isinstance(cursor, dict) or cursor.pop("version", None) != CURSOR_VERSION:
        return {}
    return cursor


def write_cursor(**remembered: Any) -> str:
    return json.dumps({"version": CURSOR_VERSION, **remembered}, sort_keys=True)
