"""Read a folder of images: metadata files as Hugging Face's imagefolder has them, or a text file for each image."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mllm_assets.data.ingest.paths import find_folder, find_media
from mllm_assets.data.ingest.source_rows import RowReader, SourceRow, class_names, require_named
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.data.ingest.split_spec import SIDES
from mllm_assets.data.ingest.tables import MAX_NAMED
from mllm_assets.data.sharegpt.formats import require_format
from mllm_assets.data.sharegpt.json_text import JsonLimits, decode, read_text
from mllm_assets.data.sharegpt.pictures import IMAGE_SUFFIXES, MediaFolders, folded
from mllm_assets.data.sharegpt.row_files import FileRow, file_rows, location_of, schema_of
from mllm_assets.errors import DataError

CAPTION_SUFFIXES = (".txt", ".caption")
# folders beside the images' that hold their texts; not labels, where boxes and classes of detectors are
CAPTION_FOLDERS = ("captions", "caption", "texts", "text", "txt", "descriptions", "json", "annotations")
SIDECAR_LIMITS = JsonLimits(max_file_bytes=16 * 2**20)  # of the JSON file of one image
# a longer caption file is cut
MAX_TEXT_BYTES = 16 * 2**20
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def read_image_folder(source: SourceSpec, root: Path) -> Iterator[SourceRow]:
    """Rows of a folder: its training part, then its validation part.

    Without a metadata file each image is a row, by name: `text` is the text file of the same name, `label` the
    folder that the image is in.

    Raises:
        DataError: The folder is missing or has no images, or its metadata file cannot be read, or none of its rows;
            names the first of them.
    """
    top = find_folder(source, root)
    index = 0
    for side, part in _parts(source, top):
        metadata = find_metadata(part)
        named = find_media(source, root)
        rows = (
            row
            for path in metadata
            for row in _rows_of_metadata(path, top, source, MediaFolders(named, (path.parent, part)))
        )
        for row in rows if metadata else _rows_of_files(part, top, source):
            yield replace(row, row_index=index, source_split=side)
            index += 1


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders, by name; hidden ones are skipped."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            yield path


def images_below(folder: Path) -> Iterator[Path]:
    """The image files in a folder and its subfolders, by name."""
    return (path for path in files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES)


def find_metadata(folder: Path) -> list[Path]:
    """The metadata files in a folder and its subfolders; of several formats in one folder the first."""
    found = {path.parent: path for name in METADATA_FILES[::-1] for path in folder.rglob(name) if path.is_file()}
    hidden = {path for path in found if any(part.startswith(".") for part in path.relative_to(folder).parts)}
    return [found[parent] for parent in sorted(found.keys() - hidden)]


def _parts(source: SourceSpec, folder: Path) -> list[tuple[str | None, Path]]:
    if source.val_split is None:
        return [(None, folder)]
    named = zip(SIDES, (source.split, source.val_split, source.test_split), strict=True)
    parts: list[tuple[str | None, Path]] = [(side, folder / name) for side, name in named if name is not None]
    for _, part in parts:
        if not part.is_dir():
            raise DataError(
                f"There is no folder {part}, but source.split, val_split or test_split names it. Correct them in the "
                "dataset's YAML, or remove val_split."
            )
    return parts


def _rows_of_metadata(path: Path, top: Path, source: SourceSpec, media: MediaFolders) -> Iterator[SourceRow]:
    """A row that names no image or cannot be read gets a defect.

    It is an error where all rows do, or where no row has a column that the spec names.
    """
    num_rows, num_problems = 0, 0
    problems: list[str] = []  # the first ones
    found: dict[str, None] = {}  # an ordered set
    reader = RowReader(source, media, class_names(schema_of(path, require_format(path))))
    texts = TextFiles()
    for row in read_metadata(path):
        num_rows += 1
        values, at = row.value or {}, SourceRow(row_index=0, location=row.location(top))
        cell = reader.picture_cell(values)
        if row.problem is not None or (cell is None and not source.messages_columns):
            num_problems += 1
            unnamed = (
                f"{row.place}: expected `file_name` with the image's path, or `file_names` with a list of "
                f"them, got the columns {', '.join(map(str, values)) or 'none'}. Add it."
            )
            if len(problems) < MAX_NAMED:
                problems.append(row.problem or unnamed)
            defect = "row_unreadable" if row.problem else "image_unnamed"
            yield replace(at, defect=defect, detail=row.problem or f"columns {', '.join(map(str, values))}")
            continue
        if isinstance(cell, str) and not values.keys() & {source.caption_column, *source.messages_columns}:
            image, _ = media.find(cell)
            text = texts.of(image, top) if image else None
            values = values if text is None else {**values, source.caption_column or "text": text}
        found |= dict.fromkeys(values)
        yield from reader.read(values, at)
    if num_problems == num_rows > 0:
        more = num_problems - len(problems)
        raise DataError("\n".join([*problems, *([f"and {more} more rows."] if more else [])]))
    if found:
        require_named(source, found, str(path))


def _rows_of_files(folder: Path, top: Path, source: SourceSpec) -> Iterator[SourceRow]:
    num_rows = 0
    media, texts = MediaFolders((), (folder,)), TextFiles()
    reader = RowReader(source, media)
    for path in images_below(folder):
        num_rows += 1
        label = path.parent.name if path.parent != folder else None
        at = SourceRow(row_index=0, location=location_of(path, top))
        try:
            values = texts.values_of(path, folder)
        except DataError as error:
            values, at = {}, replace(at, defect="json_unreadable", detail=str(error))
        values.setdefault(source.label_column or "label", label)
        if (text := texts.of(path, folder)) is not None:
            values.setdefault(source.caption_column or "text", text)
        yield from reader.read(values, at, media.read(path.relative_to(folder).as_posix()))
    if not num_rows:
        raise DataError(
            f"{folder} holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))}) and none of "
            f"{', '.join(METADATA_FILES)}. Correct source.path, or choose another source.kind."
        )


class TextFiles:
    """The text files of images: beside them, or in a folder of texts beside theirs; upper case or not."""

    def __init__(self) -> None:
        self._listings: dict[Path, dict[str, str]] = {}

    def path_of(self, image: Path, top: Path, suffixes: Sequence[str] = CAPTION_SUFFIXES) -> Path | None:
        """The file of an image's text below a folder."""
        for folder in self._folders(image.parent, top):
            listing = self._listing(folder)
            for stem in (image.name, image.stem):  # a.jpg.txt is more exact than a.txt
                for suffix in suffixes:
                    if (name := listing.get(folded(stem + suffix))) is not None:
                        return folder / name
        return None

    def of(self, image: Path, top: Path) -> str | None:
        """An image's text; `conversation.text_defect` reports what is not UTF-8 in it."""
        path = self.path_of(image, top)
        if path is None or not path.resolve().is_relative_to(top.resolve()) or not path.is_file():
            return None
        try:
            with path.open("rb") as file:
                return file.read(MAX_TEXT_BYTES).decode("utf-8-sig", "replace").strip()
        except OSError:  # no permission: treated as missing
            return None

    def values_of(self, image: Path, top: Path) -> dict[str, Any]:
        """What a JSON file of an image's name says.

        Raises:
            DataError: It is not one JSON object.
        """
        path = self.path_of(image, top, (".json",))
        if path is None or not path.resolve().is_relative_to(top.resolve()) or not path.is_file():
            return {}
        value = decode(read_text(path, SIDECAR_LIMITS), path, 1)
        if not isinstance(value, dict):
            raise DataError(f"{path}: expected an object, got {type(value).__name__}. Correct it.")
        return value

    def _folders(self, folder: Path, top: Path) -> Iterator[Path]:
        """Where an image's text may be: images/cats/a.jpg has images/cats/a.txt or captions/cats/a.txt."""
        yield folder
        if not folder.is_relative_to(top):
            return
        inner = Path()  # from the folder of which one part is replaced to the image
        yield from self._texts_in(folder, inner)
        while folder != top:
            yield from self._texts_in(folder.parent, inner)
            folder, inner = folder.parent, folder.name / inner

    def _texts_in(self, folder: Path, inner: Path) -> Iterator[Path]:
        for name in CAPTION_FOLDERS:
            if (found := self._listing(folder).get(name)) is not None:
                yield folder / found / inner

    def _listing(self, folder: Path) -> dict[str, str]:
        """The names in a folder but for those of pictures, which are most of them."""
        if folder not in self._listings:
            try:
                names = (n for n in os.listdir(folder) if os.path.splitext(n)[1].lower() not in IMAGE_SUFFIXES)
                self._listings[folder] = {folded(n): n for n in names}
            except OSError:  # no folder
                self._listings[folder] = {}
        return self._listings[folder]


def read_metadata(path: Path) -> Iterator[FileRow]:
    """The rows of a metadata file; a line that is not an object is a row with a problem.

    Raises:
        DataError: The file cannot be read.
    """
    for row in file_rows(path):
        if row.problem is None and not isinstance(row.value, dict):
            problem = f"{row.place}: expected an object, got {type(row.value).__name__}. Correct it."
            row = FileRow(path, row.part, None, problem)
        yield row
