"""Read files of rows of any format, whose pictures are in the cells or named by a path."""

from collections.abc import Iterator
from pathlib import Path

from mllm_assets.data.ingest.paths import common_folder, find_files, find_media
from mllm_assets.data.ingest.source_rows import RowReader, SourceRow, class_names, needed_columns, require_named
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.data.sharegpt.formats import require_format
from mllm_assets.data.sharegpt.pictures import MediaFolders
from mllm_assets.data.sharegpt.row_files import file_rows, location_of, schema_of
from mllm_assets.errors import DataError

MAX_NAMED = 10  # of rows with problems


def read_tables(source: SourceSpec, root: Path) -> Iterator[SourceRow]:
    """Rows of all files in the order of `path`, those of a pattern by name.

    Raises:
        DataError: A file is missing, damaged or of no known format, lacks a column, or has only unreadable rows.
    """
    files = find_files(source, root)
    top = common_folder(files)
    index = 0
    for path in files:
        media = MediaFolders(named_for(path, find_media(source, root)), (path.parent, top))
        for row in rows_of_table(path, top, source, media, index):
            yield row
            index = row.row_index + 1


def named_for(path: Path, folders: list[Path]) -> list[Path]:
    """Of several media folders, those that a file's own name names: train2017 for captions_train2017.json."""
    chosen = [folder for folder in folders if folder.name.lower() in path.stem.lower()]
    return chosen or folders


def rows_of_table(path: Path, top: Path, source: SourceSpec, media: MediaFolders, index: int) -> Iterator[SourceRow]:
    """The rows of one file, numbered from `index` on; raises DataError as `read_tables`."""
    schema = schema_of(path, require_format(path))
    columns = None if schema is None else needed_columns(source, schema, path.name)
    reader = RowReader(source, media, class_names(schema))
    num_rows, problems, found = 0, [], dict.fromkeys(columns or ())
    for row in file_rows(path, columns):
        num_rows += 1
        problem = row.problem
        if problem is None and not isinstance(row.value, dict):
            problem = f"{row.place}: expected an object, got {type(row.value).__name__}. Correct it."
        if problem is not None:
            problems += [problem] if len(problems) < MAX_NAMED else []
            yield SourceRow(row_index=index, location=row.location(top), defect="row_unreadable", detail=problem)
            index += 1
            continue
        found |= dict.fromkeys(row.value)
        for read in reader.read(row.value, SourceRow(row_index=index, location=row.location(top))):
            yield read
            index += 1
    if num_rows and not found:
        raise DataError("\n".join(problems))
    if found and schema is None:
        require_named(source, found, location_of(path, path.parent))
