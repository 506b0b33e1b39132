"""Read a folder of images: `metadata.jsonl` as Hugging Face's imagefolder has it, or a text file beside each image."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mllm_assets.artifacts import path_inside
from mllm_assets.data.images import MAX_SOURCE_BYTES
from mllm_assets.data.metadata_file import METADATA_FILES, Problems, file_names, read_metadata, unnamed_images
from mllm_assets.data.paths import find_folder, location_of
from mllm_assets.data.rows import Images, SourceRow, loose_row, require_named, unreadable_row
from mllm_assets.data.spec import SourceSpec
from mllm_assets.errors import DataError

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
CAPTION_SUFFIXES = (".txt", ".caption")
# of a caption nothing above this is read: it is not gigabytes long
MAX_TEXT_BYTES = 16 * 2**20


def read_image_folder(source: SourceSpec, root: Path) -> Iterator[SourceRow]:
    """Rows of a folder, those of its validation part after those of its training part.

    Without a metadata file each image is a row, by name: `text` is the text file of the same name, `label` the
    folder that the image is in.

    Raises:
        DataError: The folder is missing or holds no images, or its metadata file cannot be read, or no row of it;
            names the first of them.
    """
    folder = find_folder(source, root)
    start = 0
    for side, part in _parts(source, folder):
        metadata = [part / name for name in METADATA_FILES if (part / name).is_file()]
        rows = _rows_of_metadata(metadata[0], folder, source, start) if metadata else None
        for row in rows or _rows_of_files(part, folder, source, start):
            start += 1
            yield replace(row, source_split=side)


def images_below(folder: Path) -> Iterator[Path]:
    """The image files in a folder and its subfolders, by name; hidden ones are left alone."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file():
            yield path


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


def _rows_of_metadata(path: Path, top: Path, source: SourceSpec, start: int) -> Iterator[SourceRow]:
    """A row that names no image, or cannot be read, is a row with a defect; where all are, something else is wrong.

    So it is where no row has a column that the spec names.
    """
    folder, num_rows = path.parent, 0
    problems = Problems()
    found: dict[str, None] = {}  # in their order
    for index, row in enumerate(read_metadata(path), start):
        num_rows += 1
        values, location = row.values, location_of(path, top, row.part)
        if row.problem is not None:
            problems.add(row.problem)
            yield unreadable_row(index, location)
            continue
        names = file_names(values)
        if names is None:
            problems.add(f"{path}, {row.place}: {unnamed_images(values)}")
            yield unreadable_row(index, location, "image_unnamed")
            continue
        if not values.keys() & {source.caption_column, source.messages_column} and len(names) == 1:
            text = _caption_beside(folder, names[0])
            values = values if text is None else {**values, source.caption_column or "text": text}
        found |= dict.fromkeys(values)
        images, defect = read_images(folder, names)
        yield loose_row(values, images, source, index, location, defect)
    if problems.count == num_rows > 0:
        raise DataError(problems.text())
    if found:
        require_named(source, found, str(path))


def read_images(folder: Path, names: list[str]) -> tuple[Images, str | None]:
    """The bytes of named files, None for one that is not there, and the reason where one is not to be read."""
    images: list[bytes | None] = []
    defect = None
    for name in names:
        data, reason = _read_image(folder, name)
        images.append(data)
        defect = defect or reason
    return tuple(images), defect


def _read_image(folder: Path, name: str) -> tuple[bytes | None, str | None]:
    try:
        path = path_inside(folder, name, what=name)
    except DataError:
        return None, "image_outside_root"
    if not path.is_file():
        return None, None
    try:
        if path.stat().st_size > MAX_SOURCE_BYTES:
            return None, "image_too_many_bytes"
        return path.read_bytes(), None
    except OSError:  # no permission, a bad block, or gone meanwhile
        return None, "image_file_unreadable"


def _rows_of_files(folder: Path, top: Path, source: SourceSpec, start: int) -> Iterator[SourceRow]:
    num_rows = 0
    for index, path in enumerate(images_below(folder), start):
        num_rows += 1
        name = path.relative_to(folder).as_posix()
        label = path.parent.name if path.parent != folder else None
        values = {source.caption_column or "text": _caption_beside(folder, name), source.label_column or "label": label}
        images, defect = read_images(folder, [name])
        yield loose_row(values, images, source, index, location_of(path, top), defect)
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
            try:
                with path.open("rb") as file:
                    return file.read(MAX_TEXT_BYTES).decode("utf-8-sig", "replace").strip()
            except OSError:  # no permission: as good as not there
                continue
    return None
