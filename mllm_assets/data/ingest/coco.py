"""Read annotations that are joined with pictures, and questions with answers, by ids: COCO captions and VQA."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mllm_assets.data.ingest.paths import common_folder, find_files, find_media
from mllm_assets.data.ingest.source_rows import RowReader, SourceRow, require_named
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.data.ingest.tables import named_for
from mllm_assets.data.sharegpt.formats import require_format
from mllm_assets.data.sharegpt.json_text import object_items
from mllm_assets.data.sharegpt.pictures import MediaFolders
from mllm_assets.data.sharegpt.row_files import location_of
from mllm_assets.errors import DataError

ANNOTATIONS, IMAGES, QUESTIONS, CATEGORIES = "annotations", "images", "questions", "categories"


@dataclass(frozen=True, slots=True)
class _Joined:
    """What annotations are joined with, by id; texts only, so that it is small."""

    images: dict[Any, str] = field(default_factory=dict)
    questions: dict[Any, tuple[str, Any]] = field(default_factory=dict)
    categories: dict[Any, str] = field(default_factory=dict)

    def add(self, path: Path) -> bool:
        """Take in a file's pictures, questions and categories; whether it has annotations."""
        has_annotations = False
        for key, value, is_item in object_items(path):
            if not (is_item and isinstance(value, dict)):
                continue
            has_annotations |= key == ANNOTATIONS
            if key == IMAGES and isinstance(value.get("file_name"), str):
                self.images[value.get("id")] = value["file_name"]
            elif key == QUESTIONS and isinstance(value.get("question"), str):
                self.questions[value.get("question_id")] = (value["question"], value.get("image_id"))
            elif key == CATEGORIES and isinstance(value.get("name"), str):
                self.categories[value.get("id")] = value["name"]
        return has_annotations


def read_coco(source: SourceSpec, root: Path) -> Iterator[SourceRow]:
    """The annotations of each file in their order, with what their ids name; a picture has a row for each of its texts.

    The columns are an annotation's keys, and `file_name`, `question` and `category` of what it is joined with. Files of
    the same `path` are joined with each other: VQA has its questions in one of their own.

    Raises:
        DataError: A file is missing or is not such a JSON object, or there are no annotations.
    """
    files = find_files(source, root)
    top = common_folder(files)
    folders = find_media(source, root)
    index = 0
    found: dict[Path, dict[str, None]] = {}
    readers = {path: RowReader(source, MediaFolders(named_for(path, folders), (path.parent, top))) for path in files}
    for path, number, values in annotations_of(files):
        columns = found.setdefault(path, {})
        columns |= dict.fromkeys(values)
        at = SourceRow(row_index=index, location=location_of(path, top, f"row {number}"))
        for row in readers[path].read(values, at if values else replace(at, defect="row_unreadable")):
            yield replace(row, row_index=index)
            index += 1
    for path, columns in found.items():
        require_named(source, columns, path.name)


def annotations_of(files: list[Path]) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Each annotation's file, number and columns, those of what it is joined with included.

    Raises:
        DataError: As `read_coco`.
    """
    files = [path for path in files if require_format(path).kind == "json_object"]
    joined = _Joined()
    annotated = [path for path in files if joined.add(path)]
    if not annotated:
        names = ", ".join(path.name for path in files) or "no file"
        raise DataError(f"{names}: there is no JSON object with a list `annotations`. Name the annotation files.")
    for path in annotated:
        items = (value for key, value, is_item in object_items(path) if key == ANNOTATIONS and is_item)
        for number, value in enumerate(items):
            yield path, number, _values(value, joined) if isinstance(value, dict) else {}


def _values(value: dict[str, Any], joined: _Joined) -> dict[str, Any]:
    question, image_id = joined.questions.get(value.get("question_id"), (None, None))
    image_id = value.get("image_id", image_id)
    name = joined.images.get(image_id)
    if name is None and image_id is not None:
        name = str(image_id)  # VQA has no list of pictures: they are found by number
    answer = value.get("multiple_choice_answer")
    values = {
        "id": value.get("id", value.get("question_id")),
        "file_name": name,
        "question": question,
        "category": joined.categories.get(value.get("category_id")),
        "answer": answer,
        **value,
    }
    return {key: item for key, item in values.items() if item is not None}
