"""The pictures and videos that a row of LLaMA-Factory's names: files in the folders that it may name."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.data.sharegpt.conversation import IMAGE_PLACEHOLDER
from mllm_assets.data.sharegpt.entries import EntryInfo
from mllm_assets.data.sharegpt.pictures import MAX_SHOWN_CHARS, REMOTE, MediaFolders, is_embedded, listed_in_text


@dataclass(frozen=True, slots=True)
class Pictured:
    """Where the pictures that rows name are: below `media_dir`, where there is one, and below `data_dir`."""

    data_dir: Path
    media_dir: Path | None
    folders: MediaFolders

    def problem(self, name: str, defect: str | None, place: str, *, kind: str = "image") -> str:
        """Why a picture, or a file of another kind, was not found, and what to do."""
        near = self.media_dir or self.data_dir
        name = name if len(name) <= MAX_SHOWN_CHARS else f"{name[:MAX_SHOWN_CHARS]}…"
        other = "" if self.media_dir else " Or name the folder that they are relative to: media_dir in the recipe."
        if name.partition("://")[0].lower() in REMOTE:
            return f"{place}: the {kind} {name!r} is an address. Download it, and name the file."
        if defect == "image_missing":
            also = f", nor in {self.data_dir}" if self.media_dir else ""
            return (
                f"{place}: there is no {kind} {near / name}{also}. Paths are relative to {near}; add the file.{other}"
            )
        both = f"{near} and {self.data_dir}" if self.media_dir else str(near)
        return f"{place}: the path {name!r} leaves {both}. Name the folder that holds it: media_dir in the recipe."


def media_folders(data_dir: Path, media_dir: Path | None) -> MediaFolders:
    """Where an entry's pictures are looked for."""
    return MediaFolders([media_dir] if media_dir else [], [data_dir])


def images_of(
    value: Mapping[str, Any],
    in_parts: tuple[Any, ...],
    entry: EntryInfo,
    place: str,
    folder: Pictured,
    problems: list[str],
) -> tuple[Path, ...]:
    """The pictures of a row, or what is wrong with them in `problems`."""
    column = entry.columns.get("images")
    cell = None if column is None else value.get(column)
    names = listed_in_text(cell) or [cell] if isinstance(cell, str) else cell or []
    names = [*(names if isinstance(names, list) else [names]), *in_parts]
    names = [name.get("path") if isinstance(name, dict) and name.get("bytes") is None else name for name in names]
    images = []
    for name in names:
        if not isinstance(name, str) or is_embedded(name):
            command = shlex.join(["mllm-assets", "add-dataset", str(folder.data_dir), "--entry", entry.name])
            problems.append(
                f"{place}: {column or 'a message'!r} embeds a picture, and a directory that is trained on as it is "
                f"names files. {command} declares a dataset that holds them; name its entries in the recipe instead."
                if isinstance(name, dict | bytes | str)
                else f"{place}: {column!r} should be a list of paths. Correct the row."
            )
            return ()
        path, defect = folder.folders.find(name)
        if path is not None:
            images.append(path)
        else:
            problems.append(folder.problem(name, defect, place))
    return tuple(images)


def videos_of(
    value: Mapping[str, Any], entry: EntryInfo, place: str, folder: Pictured, problems: list[str]
) -> tuple[Path, ...]:
    """The videos of a row, or what is wrong with them in `problems`."""
    column = entry.columns.get("videos")
    cell = None if column is None else value.get(column)
    names = listed_in_text(cell) or [cell] if isinstance(cell, str) and cell else cell or []
    names = names if isinstance(names, list) else [names]
    names = [name.get("path") if isinstance(name, dict) and name.get("bytes") is None else name for name in names]
    videos = []
    for name in names:
        if not isinstance(name, str):
            found = "a list of frames" if isinstance(name, list) else f"{type(name).__name__}"
            problems.append(
                f"{place}: {column!r} should be a list of paths of video files, got {found}. Name a file; frames that "
                f"are pictures of their own are shown as images, with {IMAGE_PLACEHOLDER} for each."
            )
            return ()
        path, defect = folder.folders.find(name)
        if path is not None:
            videos.append(path)
        else:
            problems.append(folder.problem(name, defect, place, kind="video"))
    return tuple(videos)
