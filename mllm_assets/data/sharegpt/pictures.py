"""The pictures that a row holds or names: bytes, structs, paths, data URLs, base64, or a list of these."""

import ast
import base64
import binascii
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from mllm_assets.artifacts import path_inside
from mllm_assets.errors import DataError

IMAGE_SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .avif .heic .heif .ppm .pgm .pbm .pnm .pfm .jp2 "
    ".j2k .jpx .ico".split()
)
# keys of an object that is a picture: its bytes first, then where it is
BYTES_KEYS = ("bytes", "data", "base64")
PATH_KEYS = ("path", "file_name", "filename", "url", "image_url", "src", "image")
# the largest image file, whatever a dataset's `max_image_bytes` is: a larger one does not fit into an Arrow column
MAX_SOURCE_BYTES = 2**30
MAX_SHOWN_CHARS = 200
MAX_LIST_CHARS = 2**20
MIN_BASE64_CHARS = 64  # shorter texts are names
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*|[A-Za-z0-9_\-\s]+={0,2}\s*")
CAPTION_NUMBER = re.compile(r"#\d+$")  # Flickr8k's names of the captions of one picture
# how COCO's pictures, which VQA, A-OKVQA and others name by number, are called
BY_NUMBER = ("{:012d}", "COCO_train2014_{:012d}", "COCO_val2014_{:012d}", "COCO_test2015_{:012d}")
MAX_DIGITS = 12
REMOTE = ("http", "https", "s3", "gs", "hf", "ftp")


@dataclass(frozen=True, slots=True)
class Pictures:
    """A row's undecoded pictures, None for one that is missing; `defect` is the first reason why one has no bytes.

    `looked_for` is the value or the path that the defect is about, `files` are those that were read.
    """

    images: tuple[bytes | None, ...] = ()
    defect: str | None = None
    looked_for: str | None = None
    files: tuple[Path, ...] = ()

    def __add__(self, other: "Pictures") -> "Pictures":
        first = self if self.defect else other
        images, files = (*self.images, *other.images), (*self.files, *other.files)
        return Pictures(images, first.defect, first.looked_for, files)


class MediaFolders:
    """The folders that pictures' paths are relative to. Nothing outside of them is read, links included.

    Args:
        named: Those that the YAML or an entry names; a path that is in several of them is ambiguous.
        beside: Where else to look, in order: the folder of the file that names the picture, and the source's.
    """

    def __init__(self, named: Iterable[Path], beside: Iterable[Path] = ()) -> None:
        self._named = list(dict.fromkeys(folder.resolve() for folder in named))
        self._beside = list(dict.fromkeys(folder.resolve() for folder in beside))
        self._listings: dict[Path, dict[str, list[str]]] = {}
        self._resolved: dict[tuple[Path, str], Path] = {}
        self.are_plain = True  # so far each name was that of a file, without a link or another spelling

    def find(self, name: str) -> tuple[Path | None, str | None]:
        """The file, or None with the reject reason."""
        defect = "image_missing"
        found: list[Path] = []
        for folder in (*self._named, *self._beside):
            if found and folder not in self._named:
                break
            try:
                if (path := self._inside(folder, name)) is not None:
                    found.append(path)
            except DataError:
                defect = "image_outside_root"
            except (OSError, ValueError):  # a name that no file can have
                continue
        different = dict.fromkeys(found)
        if len(different) > 1:
            return None, "image_ambiguous"
        return (found[0], None) if found else (None, defect)

    def _allowed(self, folder: Path, name: str) -> Path:
        """The path that a name is below a folder, if it is inside of one of all the folders, links followed."""
        try:
            return path_inside(folder, name, what=name)
        except DataError as error:
            try:
                resolved = (folder / name).resolve()
            except (OSError, ValueError, RuntimeError):  # a name that no file can have, links in a circle
                raise error from None
            if not any(resolved.is_relative_to(other) for other in (*self._named, *self._beside)):
                raise
            return resolved

    def _inside(self, folder: Path, name: str) -> Path | None:
        """The file below one folder under any spelling of its name: separators, composed letters, upper case."""
        if name.startswith("file://"):
            name = os.fsdecode(unquote_to_bytes(urlsplit(name).path))
        parent, last = os.path.split(name)
        if (folder, parent) not in self._resolved:  # once, not for each row
            self._resolved[folder, parent] = found = self._allowed(folder, parent)
            self.are_plain &= found == folder / parent
        path = self._resolved[folder, parent] / last
        with suppress(OSError):
            if last and stat.S_ISREG(os.lstat(path).st_mode):
                return path
        self.are_plain = False
        spellings = (name, name.replace("\\", "/"), CAPTION_NUMBER.sub("", name))
        for spelling in dict.fromkeys(spellings):  # a link, another spelling, or wrong
            path = self._allowed(folder, spelling)
            if path.is_file():
                return path
        return None if os.path.isabs(name) else self._by_listing(folder, name.replace("\\", "/"))

    def _by_listing(self, folder: Path, name: str) -> Path | None:
        """A file whose name differs from the row's in case, in how its letters are composed, or by its suffix."""
        path = folder
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts or not parts:
            return None
        for part in parts:
            found = self._listing(path).get(folded(part), [])
            if part == parts[-1] and not found and Path(part).suffix.lower() not in IMAGE_SUFFIXES:
                listing = self._listing(path)
                for stem in stems_of(part):
                    suffixed = [listing.get(folded(stem + suffix), []) for suffix in sorted(IMAGE_SUFFIXES)]
                    if found := [file for files in suffixed for file in files]:
                        break
            if len(found) != 1:  # none, or several, of which neither is the one
                return None
            path = path / found[0]
        return path if self._allowed(folder, str(path.relative_to(folder))).is_file() else None

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._listings:
            listing: dict[str, list[str]] = {}
            try:
                for entry in os.listdir(folder):
                    listing.setdefault(folded(entry), []).append(entry)
            except OSError:  # no folder
                listing = {}
            self._listings[folder] = listing
        return self._listings[folder]

    def read_remote(self, address: str) -> Pictures:
        """The picture at an address, which nothing here downloads."""
        return Pictures((None,), "image_is_remote", address[:MAX_SHOWN_CHARS])

    def read(self, name: str) -> Pictures:
        """The bytes of a file that a row names."""
        path, defect = self.find(name)
        if path is None:
            return Pictures((None,), defect, name[:MAX_SHOWN_CHARS])
        try:
            if path.stat().st_size > MAX_SOURCE_BYTES:
                return Pictures((None,), "image_too_many_bytes", name)
            return Pictures((path.read_bytes(),), files=(path,))
        except OSError:  # no permission, a bad block, or gone meanwhile
            return Pictures((None,), "image_file_unreadable", name)


def read_pictures(cell: Any, media: MediaFolders) -> Pictures:
    """The pictures of a cell; an absent value holds none."""
    if cell is None or cell == "":
        return Pictures()
    if isinstance(cell, bytes | bytearray):
        return Pictures((bytes(cell),)) if _fits(cell) else Pictures((None,), "image_too_many_bytes")
    if isinstance(cell, Mapping):
        return _of_object(cell, media)
    if isinstance(cell, str):
        return _of_text(cell, media)
    if isinstance(cell, Sequence):
        found = Pictures()
        for item in cell:
            found += read_pictures(item, media) if item not in (None, "") else Pictures((None,), "image_missing")
        return found
    return Pictures((None,), "image_unreadable", repr(cell)[:MAX_SHOWN_CHARS])


def _of_object(cell: Mapping[str, Any], media: MediaFolders) -> Pictures:
    for key in BYTES_KEYS:
        value = cell.get(key)
        if isinstance(value, str) and (data := _decoded(value)) is not None:
            value = data
        if isinstance(value, bytes | bytearray):
            return read_pictures(bytes(value), media)
    for key in PATH_KEYS:
        if cell.get(key) not in (None, ""):
            return read_pictures(cell[key], media)
    if cell.keys() & {*BYTES_KEYS, *PATH_KEYS}:  # `datasets` writes a missing picture so
        return Pictures((None,), "image_missing", "an object without bytes and path")
    return Pictures((None,), "image_unreadable", f"an object with {', '.join(map(str, cell))}"[:MAX_SHOWN_CHARS])


def _of_text(text: str, media: MediaFolders) -> Pictures:
    if text.startswith("data:"):
        header, _, payload = text.partition(",")
        data = _decoded(payload) if header.endswith(";base64") else unquote_to_bytes(payload)
        return Pictures((data,)) if data else Pictures((None,), "image_unreadable", text[:MAX_SHOWN_CHARS])
    if (items := listed_in_text(text)) is not None:
        return read_pictures(items, media)
    if len(text) >= MIN_BASE64_CHARS and (data := _decoded(text)) is not None:
        return read_pictures(data, media)
    if urlsplit(text[:20]).scheme in REMOTE:
        return media.read_remote(text)
    return media.read(text)


def listed_in_text(text: str) -> list[Any] | None:
    """The list that a text is, as JSON or as Python writes it: CSV files have lists so."""
    if not (text.startswith("[") and text.rstrip().endswith("]")) or len(text) > MAX_LIST_CHARS:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list):
            return value
    return None


def is_embedded(text: str) -> bool:
    """Whether a text is a picture itself, as a data URL or base64, and not the name of one."""
    return text.startswith("data:") or (len(text) >= MIN_BASE64_CHARS and _decoded(text) is not None)


def _decoded(text: str) -> bytes | None:
    """The bytes of base64 text that is a picture, in either alphabet."""
    if len(text) < MIN_BASE64_CHARS or _BASE64.fullmatch(text) is None:
        return None
    plain = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if looks_like_picture(data[:32]) else None


def looks_like_picture(start: bytes) -> bool:
    """Whether the first bytes are those of a picture format; no decoder runs."""
    return (
        start.startswith(
            (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\1\0", b"\xff\x4f\xff\x51")
        )
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or start[4:8] in (b"ftyp", b"jP  ")
        or (start[:1] == b"P" and start[1:2] in b"123456fF" and start[2:3].isspace())
    )


def _fits(data: bytes | bytearray) -> bool:
    return len(data) <= MAX_SOURCE_BYTES


def stems_of(name: str) -> list[str]:
    """The stems that a picture may have which is named without a suffix, or by its number."""
    is_number = name.isascii() and name.isdecimal() and len(name) <= MAX_DIGITS
    return [name, *(pattern.format(int(name)) for pattern in BY_NUMBER)] if is_number else [name]


def folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
