"""What a cell of a table holds: a picture, the name of one, or a list."""

from collections.abc import Iterable, Mapping
from typing import Any

from mllm_assets.data.sharegpt.pictures import (
    BYTES_KEYS,
    CAPTION_NUMBER,
    IMAGE_SUFFIXES,
    PATH_KEYS,
    MediaFolders,
    listed_in_text,
    read_pictures,
)


def is_list_text(value: Any) -> bool:
    return isinstance(value, str) and listed_in_text(value) is not None


def is_picture(value: Any, media: MediaFolders) -> bool:
    """Whether a cell holds a picture's bytes or names a file that exists; texts are looked at, nothing is decoded."""
    items = listed_in_text(value) if isinstance(value, str) and value.startswith("[") else value
    if isinstance(items, list):
        return len(items) > 0 and all(is_picture(item, media) for item in items)
    if isinstance(value, Mapping) and not value.keys() & {*BYTES_KEYS, *PATH_KEYS}:
        return False
    if isinstance(value, Mapping) and value.get("bytes") is None and not any(value.get(key) for key in PATH_KEYS):
        return False
    if isinstance(value, str | int) and not isinstance(value, bool) and len(str(value)) < 64:
        return media.find(str(value))[0] is not None
    found = read_pictures(value, media)
    return len(found.images) > 0 and found.defect is None


def picture_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The values of some rows that look like names of picture files."""
    names: list[str] = []

    def add(value: Any) -> None:
        if (
            isinstance(value, str)
            and len(value) < 1000
            and (name := CAPTION_NUMBER.sub("", value)).lower().endswith(tuple(IMAGE_SUFFIXES))
        ):
            names.append(name)
        elif isinstance(value, str) and (items := listed_in_text(value)) is not None:
            add(items)
        elif isinstance(value, list):
            for item in value[:10]:
                add(item)
        elif isinstance(value, Mapping):
            for item in value.values():
                add(item)

    for row in rows:
        for value in row.values():
            add(value)
    return list(dict.fromkeys(names))
