"""Layouts of files of rows: which of a folder's files hold them, and where the pictures that they name are."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from mllm_assets.data.curate.cells import picture_names
from mllm_assets.data.curate.columns import MAX_SAMPLED, Undecided, find_roles
from mllm_assets.data.curate.inventory import UNPACK
from mllm_assets.data.curate.reading import Folder, Reading
from mllm_assets.data.ingest.coco import ANNOTATIONS, IMAGES, QUESTIONS, annotations_of
from mllm_assets.data.ingest.image_folder import TextFiles
from mllm_assets.data.ingest.sides import SIDE_WORDS, side_words, sides_of
from mllm_assets.data.ingest.source_rows import class_names
from mllm_assets.data.ingest.split_spec import SIDES, TRAIN, VAL
from mllm_assets.data.sharegpt.formats import require_format
from mllm_assets.data.sharegpt.json_text import object_items
from mllm_assets.data.sharegpt.pictures import MediaFolders
from mllm_assets.data.sharegpt.row_files import file_rows, schema_of
from mllm_assets.errors import DataError

MAX_READ_FILES = 10  # to find out what is in their columns
MAX_ITEMS, BEGINNING = 100, 4096  # of a list; bytes, or letters of base64 or of a data URL
TEXT_KEYS = {"caption", "question", "answer", "answers", "multiple_choice_answer"}
Row = Mapping[str, Any]


def first_rows(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Some rows of each of the first files, with the names of classes instead of their numbers.

    Raises:
        DataError: A file is damaged.
    """
    rows: list[dict[str, Any]] = []
    for path in files[:MAX_READ_FILES]:
        read = islice(file_rows(path), MAX_SAMPLED)
        sample = [_small(row.value) for row in read if row.problem is None and isinstance(row.value, dict)]
        for column, names in class_names(schema_of(path, require_format(path))).items():
            for row in sample:
                if isinstance(number := row.get(column), int) and 0 <= number < len(names):
                    row[column] = names[number]
        rows += sample
    return rows


def _small(value: Any) -> Any:
    """A value without most of its pictures' bytes: their beginnings tell what they are."""
    if isinstance(value, dict):
        return {name: _small(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_small(item) for item in value[:MAX_ITEMS]]
    if isinstance(value, bytes) or (isinstance(value, str) and len(value) > BEGINNING and " " not in value[:BEGINNING]):
        return value[:BEGINNING]
    return value


def read_tables_layout(folder: Folder) -> Reading | None:
    """Files of rows: those whose columns can be used; None where there are none, or each picture has a text file.

    Raises:
        DataError: None can be used, or several that differ; says why, with their columns.
    """
    found, file = folder.found, folder.options.file
    files = [path for path in found.rows if file is None or path in (folder.path / file, Path(file).resolve())]
    if file is not None and not files:
        names = ", ".join(path.relative_to(folder.path).as_posix() for path in found.rows) or "none"
        raise DataError(f"--file names {file!r}, which is not a file of rows in {folder.path}. It has: {names}.")
    joined = [path for path in files if found.rows[path].kind == "json_object" and _is_joined(path)]
    fit: list[Reading] = []
    problems: dict[Path, str] = {}
    heads: dict[Path, list[dict[str, Any]]] = {}
    for paths in _groups([path for path in files if path not in joined], heads, problems):
        try:
            fit.append(_table(folder, paths, heads))
        except DataError as error:
            problems |= dict.fromkeys(paths, str(error))
    if joined:
        try:
            fit.append(_coco(folder, joined))
        except DataError as error:
            problems |= dict.fromkeys(joined, str(error))
    if len(fit) > 1:
        options = [f"\n  --file {folder.few(r.annotations[:1])}: {r.layout}; {r.columns}" for r in fit]
        raise Undecided(f"{folder.path} can be read in several ways. Choose with one of:{''.join(options)}")
    if not fit:
        texts = TextFiles()
        pictures = found.pictures[:MAX_SAMPLED]
        if problems and not (pictures and all(texts.path_of(path, folder.path) for path in pictures)):
            packed = [f"{path.name}: {why}." for path, why in found.not_read.items() if why.endswith(UNPACK)]
            raise DataError("\n".join(list(dict.fromkeys(problems.values()))[:5] + packed[:3]))
        return None
    others = {path: problems.get(path, "another file holds the rows").split(". ")[0] for path in found.rows}
    used = {*fit[0].annotations}
    return replace(fit[0], not_read={**{p: w for p, w in others.items() if p not in used}, **fit[0].not_read})


def _groups(
    files: list[Path], heads: dict[Path, list[dict[str, Any]]], problems: dict[Path, str]
) -> Iterator[list[Path]]:
    """Files of the same columns together; some of their rows go into `heads`, what cannot be read into `problems`."""
    groups: dict[frozenset[str], list[Path]] = defaultdict(list)
    for path in files:
        if "submission" in path.stem.lower():
            problems[path] = f"{path.name}: a form for answers, as Kaggle's are, and no answers"
            continue
        try:
            heads[path] = first_rows([path])
        except DataError as error:
            problems[path] = str(error)
            continue
        if heads[path]:
            groups[frozenset(str(name) for row in heads[path] for name in row)].append(path)
        else:
            first = next((row.problem for row in islice(file_rows(path), 1) if row.problem), "it is empty")
            problems[path] = f"{path.name}: no row of it can be read. {first}"
    merged: list[tuple[frozenset[str], list[Path]]] = []
    for columns, paths in sorted(groups.items(), key=lambda item: -len(item[0])):
        # a column that is in few rows may be in none of another file's first
        same = (others for have, others in merged if have >= columns and len(columns) > len(have) / 2)
        same = (others for others in same if others[0].suffix == paths[0].suffix)
        if (others := next(same, None)) is not None:
            others += paths
        else:
            merged.append((columns, paths))
    for _, paths in merged:
        yield sorted(paths)


def _table(folder: Folder, paths: list[Path], heads: Mapping[Path, list[dict[str, Any]]]) -> Reading:
    rows = [row for path in paths[:MAX_READ_FILES] for row in heads[path][:MAX_SAMPLED]]
    dirs = _media_dirs(folder, paths, rows)
    media = MediaFolders(dirs, [*(path.parent for path in paths), folder.path])
    roles = find_roles(rows, media, folder.few(paths), folder.options.chosen)
    needed = {*roles.messages, roles.caption, roles.question, roles.label} - {None}
    missing = {path: needed - {name for row in heads[path] for name in row} for path in paths}
    lacking = {
        path: f"it has no column {', '.join(sorted(map(str, names)))}" for path, names in missing.items() if names
    }
    paths = [path for path in paths if path not in lacking]
    kind = folder.found.rows[paths[0]].kind.replace("_", " ").replace("delimited", "table of texts")
    words = side_words(paths, folder.path)
    sides = sides_of(*map(words.get, SIDES)) or _split_column(rows)
    source = {"kind": "table", "path": folder.shown_all(paths), **sides, **folder.media(dirs)}
    return folder.reading(f"{kind}: {folder.few(paths)}", source, roles, paths, lacking)


def _split_column(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The column that says which split each row is of: at least two of them, and nothing else."""
    for column in ("split", "subset", "set", "partition"):
        values = {str(row[column]).strip().lower() for row in rows if row.get(column) is not None}
        sides = {SIDE_WORDS.get(value) for value in values}
        if all(column in row for row in rows) and None not in sides and {TRAIN, VAL} <= sides:
            return {"split_column": column}
    return {}


def _media_dirs(folder: Folder, paths: list[Path], rows: list[dict[str, Any]]) -> list[Path]:
    """The folders that pictures' names are relative to, where it is not the files' own."""
    if folder.options.media_dir:
        return list(folder.options.media_dir)
    beside = MediaFolders((), [*(path.parent for path in paths), folder.path])
    names = picture_names(rows)
    left = [name for name in names if beside.find(name)[0] is None]
    dirs = folder.found.media_dirs(left, paths[0])
    if dirs or len(left) < len(names):
        return dirs
    texts = (value for row in rows for value in row.values() if isinstance(value, str | int))
    ids = {str(value) for value in texts if len(str(value)) < 100}  # whose files have a suffix
    return folder.found.media_dirs(sorted(ids)[:1000], paths[0], most=1)


def _coco(folder: Folder, paths: list[Path]) -> Reading:
    heads = {path: _head(path) for path in paths}
    texts = [path for path, head in heads.items() if head.get(ANNOTATIONS, {}).keys() & TEXT_KEYS]
    used = [path for path, head in heads.items() if path in texts or (QUESTIONS in head and texts)]
    if not used:
        columns = sorted({name for head in heads.values() for name in head.get(ANNOTATIONS, {})})
        raise DataError(
            f"{folder.few(paths)}: the annotations hold no captions and no answers. Their columns: "
            f"{', '.join(columns)}. Boxes and masks are not trained on."
        )
    names = [name for path in used for name in islice(_names(path), MAX_SAMPLED)]
    dirs = list(folder.options.media_dir) or (
        folder.found.media_dirs(names, used[0]) if names else sorted({path.parent for path in folder.found.pictures})
    )
    rows = [values for _, _, values in islice(annotations_of(used), MAX_SAMPLED)]
    media = MediaFolders(dirs, [used[0].parent, folder.path])
    roles = find_roles(rows, media, folder.few(used), folder.options.chosen)
    words = side_words([path for path in used if path in texts], folder.path)
    sides = sides_of(*map(words.get, SIDES)) if len(used) == len(texts) else {}
    source = {"kind": "coco", "path": folder.shown_all(used), **sides, **folder.media(dirs)}
    not_read = dict.fromkeys((path for path in paths if path not in used), "its annotations are not texts")
    return folder.reading(f"annotations joined with images: {folder.few(used)}", source, roles, used, not_read)


def _head(path: Path) -> dict[str, dict[str, Any]]:
    """The first item of each list of an object."""
    head: dict[str, dict[str, Any]] = {}
    for key, value, is_item in object_items(path):
        if is_item and isinstance(value, dict):
            head.setdefault(key, value)
    return head


def _is_joined(path: Path) -> bool:
    """Whether a JSON object is joined by ids: annotations of pictures in a list of their own, or of questions."""
    try:
        head = _head(path)
    except DataError:
        return False
    named = head.get(ANNOTATIONS, {}).keys() & {"image_id", "question_id"}
    return bool(named) or "question_id" in head.get(QUESTIONS, {})


def _names(path: Path) -> Iterator[str]:
    for key, value, _ in object_items(path):
        if key == IMAGES and isinstance(value, dict) and isinstance(value.get("file_name"), str):
            yield value["file_name"]
