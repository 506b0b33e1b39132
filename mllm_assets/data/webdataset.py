"""Read WebDataset tar files: members that share a key are one sample, such as `0001.jpg` with `0001.txt`."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_assets.data.image_folder import IMAGE_SUFFIXES, MAX_TEXT_BYTES
from mllm_assets.data.images import MAX_SOURCE_BYTES
from mllm_assets.data.json_text import decode
from mllm_assets.data.paths import common_folder, find_files, location_of
from mllm_assets.data.rows import Images, SourceRow, loose_row
from mllm_assets.data.spec import SourceSpec
from mllm_assets.errors import DataError

# extension and bytes, None of an image that is too large
Members = list[tuple[str, bytes | None]]


def read_webdataset(source: SourceSpec, root: Path) -> Iterator[SourceRow]:
    """Samples of all tar files in their order; nothing is unpacked to the disk.

    A sample's columns are the keys of its `.json`, `text` from its `.txt`, `label` from its `.cls`. It may hold
    several images: `0001.0.jpg`, `0001.1.jpg`.

    Raises:
        DataError: A file is missing, damaged or no tar; names it and, where there is one, the member.
    """
    index = 0
    files = find_files(source, root)
    folder = common_folder(files)
    for path in files:
        for key, members in _samples(path):
            values, images, defect = _read_sample(members, source)
            yield loose_row(values, images, source, index, location_of(path, folder, key), defect)
            index += 1


def _samples(path: Path) -> Iterator[tuple[str, Members]]:
    """Each sample's key, with extension and bytes of its members; they stand next to each other."""
    key: str | None = None
    members: Members = []
    place = "before the first member"
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                place = f"in or after the member {member.name!r}"
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                # as in the webdataset library: no directories, links, nor names without an extension
                if not member.isreg() or not stem or not dot:
                    continue
                own_key = f"{folder}/{stem}" if folder else stem
                if key is not None and own_key != key:
                    yield key, members
                    members = []
                key = own_key
                members.append((extension.lower(), _content(archive, member)))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"source.path: {path} cannot be read as a tar file ({error}, {place}). Copy it anew from where it came."
        ) from error
    if key is not None:
        yield key, members


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """A member's bytes, None of an image that is larger than any."""
    file = archive.extractfile(member)
    assert file is not None  # a regular member
    is_image = f".{member.name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES
    if is_image and member.size > MAX_SOURCE_BYTES:
        return None
    data = file.read(MAX_SOURCE_BYTES if is_image else MAX_TEXT_BYTES)
    if is_image and len(data) != member.size:
        raise tarfile.ReadError("it is cut off")
    return data


def _read_sample(members: Members, source: SourceSpec) -> tuple[dict[str, Any], Images, str | None]:
    columns = {"txt": source.caption_column or "text", "cls": source.label_column or "label"}
    values: dict[str, Any] = {}
    images: list[bytes | None] = []
    defect = None
    for extension, data in members:
        kind = extension.rpartition(".")[2]
        try:
            if data is None:
                images.append(None)
                defect = "image_too_many_bytes"
            elif f".{kind}" in IMAGE_SUFFIXES:
                images.append(data)
            elif kind == "json":
                values |= dict(decode(data.decode("utf-8-sig"), Path(extension), 1))
            elif kind in columns:
                values.setdefault(columns[kind], data.decode("utf-8-sig").strip())
        except (ValueError, TypeError, DataError):
            defect = f"{kind}_unreadable"
    return values, tuple(images), defect
