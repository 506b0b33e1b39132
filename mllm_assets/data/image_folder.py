"""Read a folder of images: `metadata.jsonl` as Hugging Face's imagefolder has it, or a text file beside each image."""

import csv
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.artifacts import path_inside
from mllm_assets.data.arrow_values import rows_of
from mllm_assets.data.images import MAX_SOURCE_BYTES
from mllm_assets.data.json_text import decode, read_text, text_lines
from mllm_assets.data.paths import find_folder
from mllm_assets.data.rows import SourceRow, loose_row
from mllm_assets.data.spec import SourceSpec
from mllm_assets.errors import DataError

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# the columns that name a row's image or images, as `datasets` knows them
FILE_COLUMNS = ("file_name", "file_names", "images_file_names", "image_file_name")
CAPTION_SUFFIXES = (".txt", ".caption")
# of a caption nothing above this is read: it is not gigabytes long
MAX_TEXT_BYTES = 16 * 2**20


def read_image_folder(source: SourceSpec, root: Path) -> Iterator[SourceRow]:
    """Rows of a folder, those of its validation part after those of its training part.

    Without a metadata file each image is a row, by name: `text` is the text file of the same name, `label` the
    folder that the image is in.

    Raises:
        DataError: The folder is missing or holds no images, or its metadata file cannot be read; names the line.
    """
    folder = find_folder(source, root)
    start = 0
    for side, part in _parts(source, folder):
        metadata = [part / name for name in METADATA_FILES if (part / name).is_file()]
        rows = _rows_of_metadata(metadata[0], source, start) if metadata else _rows_of_files(part, source, start)
        for row in rows:
            start += 1
            yield replace(row, source_split=side)


def images_below(folder: Path) -> Iterator[Path]:
    """The image files in a folder and its subfolders, by name; hidden ones are left alone."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file():
            yield path


def read_metadata(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a metadata file with their line (of a Parquet file: row) numbers.

    Raises:
        DataError: It cannot be read; names the line.
    """
    if path.suffix == ".parquet":
        try:
            yield from enumerate((row for batch in pq.read_table(path).to_batches() for row in rows_of(batch)), 1)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}). Write it again.") from error
        return
    if path.suffix == ".csv":
        yield from enumerate(csv.DictReader(io.StringIO(read_text(path), newline="")), 2)
        return
    for number, line in text_lines(path):
        value = decode(line, path, number)
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: expected an object, got {type(value).__name__}. Correct it.")
        yield number, value


def file_names(values: dict[str, Any], place: str) -> list[str]:
    """The images that a row of a metadata file names.

    Raises:
        DataError: It names none.
    """
    for column in FILE_COLUMNS:
        found = values.get(column)
        if isinstance(found, str) and found:
            return [found]
        if isinstance(found, list) and all(isinstance(name, str) for name in found):
            return found
    raise DataError(
        f"{place}: expected `file_name` with the image's path, or `file_names` with a list of them, got the columns "
        f"{', '.join(map(str, values)) or 'none'}. Add it."
    )


def _parts(source: SourceSpec, folder: Path) -> list[tuple[str | None, Path]]:
    if source.val_split is None:
        return [(None, folder)]
    parts: list[tuple[str | None, Path]] = [("train", folder / source.split), ("val", folder / source.val_split)]
    for _, part in parts:
        if not part.is_dir():
            raise DataError(
                f"There is no folder {part}, but source.split and source.val_split name it. Correct them in the "
                "dataset's YAML, or remove val_split."
            )
    return parts


def _rows_of_metadata(path: Path, source: SourceSpec, start: int) -> Iterator[SourceRow]:
    folder = path.parent
    for index, (number, values) in enumerate(read_metadata(path), start):
        place = f"{path}, line {number}"
        if not values.keys() & {source.caption_column, source.messages_column}:
            names = file_names(values, place)
            if len(names) == 1 and (text := _caption_beside(folder, names[0])) is not None:
                values = {**values, source.caption_column or "text": text}
        images, defect = read_images(folder, file_names(values, place))
        yield loose_row(values, images, source, index, defect)


def read_images(folder: Path, names: list[str]) -> tuple[tuple[bytes, ...], str | None]:
    """The bytes of named files, b"" for one that is not there, and the reason where one is not to be read."""
    images, defect = [], None
    for name in names:
        try:
            path = path_inside(folder, name, what=name)
        except DataError:
            images.append(b"")
            defect = defect or "image_outside_root"
            continue
        is_file = path.is_file()
        if is_file and path.stat().st_size > MAX_SOURCE_BYTES:
            is_file, defect = False, defect or "image_too_many_bytes"
        images.append(path.read_bytes() if is_file else b"")
    return tuple(images), defect


def _rows_of_files(folder: Path, source: SourceSpec, start: int) -> Iterator[SourceRow]:
    num_rows = 0
    for index, path in enumerate(images_below(folder), start):
        num_rows += 1
        name = path.relative_to(folder).as_posix()
        label = path.parent.name if path.parent != folder else None
        values = {source.caption_column or "text": _caption_beside(folder, name), source.label_column or "label": label}
        images, defect = read_images(folder, [name])
        yield loose_row(values, images, source, index, defect)
    if not num_rows:
        raise DataError(
            f"{folder} holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))}) and none of "
            f"{', '.join(METADATA_FILES)}. Correct source.path, or choose another source.kind."
        )


def _caption_beside(folder: Path, image: str) -> str | None:
    """The text file of an image's name; what is not UTF-8 in it is left for `tokens.text_defect` to find."""
    for suffix in CAPTION_SUFFIXES:
        try:
            path = path_inside(folder, str(Path(image).with_suffix(suffix)), what=image)
        except (DataError, ValueError):  # outside the folder, or no file's name: the image says so itself
            continue
        if path.is_file():
            with path.open("rb") as file:
                return file.read(MAX_TEXT_BYTES).decode("utf-8-sig", "replace").strip()
    return None
