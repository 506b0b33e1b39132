"""Read WebDataset tar files: members that share a key are one sample, such as `0001.jpg` with `0001.txt`."""

import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from mllm_assets.data.ingest.image_folder import MAX_TEXT_BYTES
from mllm_assets.data.ingest.paths import common_folder, find_files
from mllm_assets.data.ingest.source_rows import RowReader, SourceRow, require_named
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.data.sharegpt.json_text import decode
from mllm_assets.data.sharegpt.pictures import IMAGE_SUFFIXES, MediaFolders, Pictures
from mllm_assets.data.sharegpt.row_files import FREE_BYTES, MAX_EXPANSION, location_of
from mllm_assets.errors import DataError

# extension and bytes, None for an image that is too large
Members = list[tuple[str, bytes | None]]

MAX_SAMPLE_BYTES, MAX_SAMPLE_MEMBERS = 2**29, 1000  # of one sample, which is in memory at once
MAX_MEMBERS, MAX_NAME_CHARS = 10**7, 4096  # of a file; Linux takes no longer path
MAX_HEADER_BYTES = 2**20  # of a member's long name or further fields: tarfile reads them at once, whatever their size
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
)  # fmt: skip


class _BoundedHeader(tarfile.TarInfo):
    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
        if (
            sum(len(name) + len(text) for name, text in archive.pax_headers.items()) > MAX_HEADER_BYTES
        ):  # those of all members, which each copies
            raise tarfile.ReadError(f"headers of all members of more than {MAX_HEADER_BYTES:,} bytes")
        return super()._proc_member(archive)  # pyright: ignore[reportAttributeAccessIssue]

    def _refuse_sparse(self, *_: object) -> NoReturn:
        """Members that claim to be larger than what is there, with a map that may be as long as the file."""
        raise tarfile.ReadError("a sparse member, which is not read")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def read_webdataset(source: SourceSpec, root: Path) -> Iterator[SourceRow]:
    """Samples of all tar files in their order; nothing is unpacked to the disk.

    A sample's columns are the keys of its `.json`, `text` from its `.txt`, `label` from its `.cls`. It may hold
    several images: `0001.0.jpg`, `0001.1.jpg`.

    Raises:
        DataError: A file is missing, damaged or not a tar file; names it and the member.
    """
    index = 0
    files = find_files(source, root)
    folder = common_folder(files)
    reader = RowReader(source, MediaFolders(()))
    found: dict[str, None] = {}
    for path in files:
        for key, members in _samples(path):
            values, pictures, defect = _read_sample(members, source)
            found |= dict.fromkeys(values)
            detail = f"{key}.{defect.partition('_')[0]}" if defect else None
            at = SourceRow(row_index=index, location=location_of(path, folder, key), defect=defect, detail=detail)
            for row in reader.read({"id": key, **values}, at, pictures):
                yield replace(row, row_index=index)
                index += 1
    if found:
        require_named(source, {*found, "image", "text"}, ", ".join(source.paths))


def _samples(path: Path) -> Iterator[tuple[str, Members]]:
    """Each sample's key, with extension and bytes of its members, which follow each other in the file."""
    key: str | None = None
    members: Members = []
    place = "before the first member"
    try:
        most_bytes = FREE_BYTES + MAX_EXPANSION * path.stat().st_size
        with tarfile.open(path, "r|*", tarinfo=_BoundedHeader) as archive:
            for number, member in enumerate(archive, 1):
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue] (keeps each header until the end)
                place = f"in or after the member {member.name[:100]!r}"
                if number > MAX_MEMBERS:
                    raise tarfile.ReadError(f"it has more than {MAX_MEMBERS:,} members")
                if len(member.name) > MAX_NAME_CHARS:
                    raise tarfile.ReadError(f"a name of {len(member.name):,} letters")
                if member.offset_data + member.size > most_bytes:
                    raise tarfile.ReadError(f"it expands to more than {most_bytes / 2**30:.1f} GiB")
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
                if len(members) < MAX_SAMPLE_MEMBERS:
                    room = MAX_SAMPLE_BYTES - sum(len(data) for _, data in members if data is not None)
                    members.append((extension.lower(), _content(archive, member, room)))
                elif members[-1][1] is not None:
                    members.append((extension.lower(), None))
    except Exception as error:  # tarfile and the decompressors raise nearly every class for damaged bytes
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"source.path: {path} cannot be read as a tar file ({why[:200]}, {place}). Copy it again from its origin."
        ) from error
    if key is not None:
        yield key, members


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, room: int) -> bytes | None:
    """A member's bytes; None for an image that its sample has no room for."""
    file = archive.extractfile(member)
    assert file is not None  # a regular member
    is_image = f".{member.name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES
    if min(member.size, member.size if is_image else MAX_TEXT_BYTES) > room:
        return None
    data = file.read(room if is_image else MAX_TEXT_BYTES)
    if is_image and len(data) != member.size:
        raise tarfile.ReadError("it is cut off")
    return data


def samples_of_tar(path: Path) -> Iterator[tuple[dict[str, Any], Pictures]]:
    """The columns and the pictures of each sample of a tar file, whatever a dataset's YAML says."""
    source = SourceSpec(kind="webdataset", path=str(path))
    for key, members in _samples(path):
        values, pictures, _ = _read_sample(members, source)
        yield {"id": key, **values}, pictures


def _read_sample(members: Members, source: SourceSpec) -> tuple[dict[str, Any], Pictures, str | None]:
    text = source.caption_column or "text"
    columns = {"txt": text, "text": text, "caption": text, "cls": source.label_column or "label"}
    values: dict[str, Any] = {}
    pictures, defect = Pictures(), None
    for extension, data in members:
        name, _, kind = extension.rpartition(".")
        try:
            if data is None:
                pictures += Pictures((None,), "image_too_many_bytes")
            elif f".{kind}" in IMAGE_SUFFIXES:
                pictures += Pictures((data,))
            elif kind == "json":
                found = decode(data.decode("utf-8-sig"), Path(extension), 1)
                values |= {name or "messages": found} if isinstance(found, list) else dict(found)
            elif kind in columns:  # 0001.question.txt beside 0001.answer.txt
                column = name if name and not name.isdecimal() else columns[kind]
                values.setdefault(column, data.decode("utf-8-sig").strip())
        except (ValueError, TypeError, DataError):
            defect = f"{kind}_unreadable"
    return values, pictures, defect
