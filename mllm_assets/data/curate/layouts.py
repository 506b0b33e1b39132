"""Which layout a folder of image-text data has, and the `source` that reads it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from mllm_assets.data.curate.columns import CAPTION_PROMPTS, LABEL_PROMPTS, MAX_SAMPLED, Undecided, find_roles
from mllm_assets.data.curate.reading import Folder, Reading
from mllm_assets.data.curate.table_layouts import first_rows, read_tables_layout
from mllm_assets.data.ingest.image_folder import METADATA_FILES, TextFiles
from mllm_assets.data.ingest.sides import side_words, sides_of
from mllm_assets.data.ingest.split_spec import SIDES
from mllm_assets.data.ingest.webdataset import samples_of_tar
from mllm_assets.data.sharegpt.entries import DATASET_INFO, ENTRY_KEYS, load_entries
from mllm_assets.data.sharegpt.pictures import MediaFolders
from mllm_assets.errors import DataError

TRAIN_FOLDERS, VAL_FOLDERS, TEST_FOLDERS = (
    ("train", "training"),
    ("val", "validation", "valid", "dev"),
    ("test", "testing"),
)
MAX_READ_TARS = 3
NUM_LOOKED_AT = 20
_BOX = re.compile(r"\d+(\s+-?\d*\.?\d+(e-?\d+)?){4,}")


def read_layout(folder: Folder) -> Reading:
    """Find out how a folder is read: by the first of the layouts that it has.

    Raises:
        DataError: It has no known layout, or several that differ; says what was found and what to do.
    """
    reading = _layout(folder)
    if folder.options.several is not None:
        reading = replace(reading, source={**reading.source, "several": folder.options.several})
    return reading


def _layout(folder: Folder) -> Reading:
    if folder.options.file is None:
        if (folder.path / DATASET_INFO).is_file() and _is_llamafactory(folder.path):
            return _llamafactory(folder)
        if metadata := [path for path in folder.found.rows if path.name in METADATA_FILES]:
            return _metadata(folder, metadata)
        if folder.found.tars:
            return _tars(folder)
        if sidecars := _sidecars(folder):
            return sidecars
    return read_tables_layout(folder) or _pictures(folder)


def _llamafactory(folder: Folder) -> Reading:
    entries, chosen = load_entries(folder.path), folder.options.entry
    if chosen is not None and chosen not in entries:
        raise DataError(f"{folder.path / DATASET_INFO} has no entry {chosen!r}. It has: {', '.join(entries)}.")
    sides = {"split": chosen} if chosen is not None else _sides(entries)
    files = [folder.path / entries[name].file_name for name in sides.values()]
    parts = [p for p in folder.found.rows if any(p == file or p.is_relative_to(file) for file in files)]
    return Reading(
        layout=f"a LLaMA-Factory directory, its entry {' and '.join(sides.values())}",
        source={
            "kind": "llamafactory",
            "path": folder.shown(folder.path),
            **sides,
            **folder.media(folder.options.media_dir),
        },
        annotations=(folder.path / DATASET_INFO, *parts),
        not_read={path: "of another entry" for path in folder.found.rows if path not in parts},
    )


def _is_llamafactory(folder: Path) -> bool:
    """Whether dataset_info.json is LLaMA-Factory's list of entries, and not what `datasets` writes about a dataset."""
    try:
        with (folder / DATASET_INFO).open("rb") as file:
            value = json.loads(file.read(2**24))
    except (ValueError, RecursionError):
        return True  # whose reader says what is wrong
    return not isinstance(value, dict) or any(isinstance(v, dict) and v.keys() & {*ENTRY_KEYS} for v in value.values())


def _sides(entries: Mapping[str, Any]) -> dict[str, str]:
    """A LLaMA-Factory directory's training and validation entry, by their names."""
    for train in entries:
        stem, _, word = train.rpartition("_")
        if word in TRAIN_FOLDERS:
            held_out = [f"{stem}_{other}" if stem else other for other in (*VAL_FOLDERS, *TEST_FOLDERS)]
            if names := [name for name in held_out if name in entries]:
                is_third = len(names) > 1 and names[-1].rpartition("_")[2] in TEST_FOLDERS
                return {"split": train, "val_split": names[0], **({"test_split": names[-1]} if is_third else {})}
    if len(entries) != 1:
        raise Undecided(
            f"{DATASET_INFO} holds {len(entries)} entries, and their names do not say which one to take. Choose with "
            f"--entry NAME: {', '.join(list(entries)[:40])}. Or train on them as they are: name one in a recipe's "
            "`dataset`, with `dataset_dir` this folder."
        )
    return {"split": next(iter(entries))}


def _metadata(folder: Folder, files: list[Path]) -> Reading:
    media = MediaFolders(folder.options.media_dir, [*(path.parent for path in files), folder.path])
    rows, texts = first_rows(files), TextFiles()
    for row in rows:  # a text file beside a picture is its text where the row has none
        name = next((row[key] for key in ("file_name", "image") if isinstance(row.get(key), str)), None)
        image = media.find(name)[0] if name else None
        if len(row) == 1 and image and (text := texts.of(image, folder.path)):
            row["text"] = text
    roles = find_roles(rows, media, folder.few(files), folder.options.chosen)
    sides = _side_folders(folder.path) if all(path.parent != folder.path for path in files) else {}
    source = {"kind": "image_folder", "path": folder.shown(folder.path), **sides}
    source |= folder.media(folder.options.media_dir)
    others = dict.fromkeys((path for path in folder.found.rows if path not in files), "a metadata file holds the rows")
    return folder.reading(f"images with {folder.few(files)}", source, roles, files, others)


def _sidecars(folder: Folder) -> Reading | None:
    """Pictures with a JSON file of the same name each; None where most have none, or have text files."""
    texts, pictures = TextFiles(), folder.found.pictures
    if any(texts.path_of(picture, folder.path) for picture in pictures[:MAX_SAMPLED]):
        return None
    some = pictures[:: len(pictures) // MAX_SAMPLED + 1]  # of 100,000 pictures each takes time
    if not any(texts.path_of(picture, folder.path, (".json",)) for picture in some):
        return None
    files = [path for picture in pictures if (path := texts.path_of(picture, folder.path, (".json",)))]
    if len(files) * 2 <= len(pictures):
        return None
    found = [picture for picture in pictures[:MAX_SAMPLED] if texts.path_of(picture, folder.path, (".json",))]
    rows = [{**texts.values_of(picture, folder.path), "image": b"\x89PNG"} for picture in found]
    roles = find_roles(rows, MediaFolders(()), folder.few(files), replace(folder.options.chosen, image="image"))
    source = {"kind": "image_folder", "path": folder.shown(folder.path), **_side_folders(folder.path)}
    return folder.reading(f"images with {len(files)} JSON files of their names", source, roles, files)


def _side_folders(path: Path) -> dict[str, str]:
    """A folder's training, validation and test part, where it has at least two; test alone validates."""
    folders = (TRAIN_FOLDERS, VAL_FOLDERS, TEST_FOLDERS)
    train, val, test = (next((name for name in names if (path / name).is_dir()), None) for names in folders)
    return sides_of(train, val, test)


def _tars(folder: Folder) -> Reading:
    tars = folder.found.tars
    samples = [sample for path in tars[:MAX_READ_TARS] for sample in islice(samples_of_tar(path), MAX_SAMPLED)]
    if not samples:
        raise DataError(f"{tars[0]} holds no samples. Copy it again from its origin.")
    if not any(pictures.images for _, pictures in samples):
        raise DataError(f"{tars[0]}: its samples hold no pictures. Their columns: {', '.join(samples[0][0])}.")
    rows = [{**values, "image": list(pictures.images[:1])} for values, pictures in samples]
    chosen = replace(folder.options.chosen, image="image")
    roles = find_roles(rows, MediaFolders(()), folder.few(tars), chosen)
    stems = {path.name.split(".")[0] for path in tars}
    not_read = {
        path: "its rows are in the tar of its name"
        if path.stem.removesuffix("_stats") in stems
        else "tars hold the rows"
        for path in folder.found.rows
    }
    words = side_words(tars, folder.path)
    source = {"kind": "webdataset", "path": _patterns(folder, tars), **sides_of(*map(words.get, SIDES))}
    return folder.reading(f"WebDataset: {folder.few(tars)}", source, roles, tars, not_read)


def _patterns(folder: Folder, tars: Sequence[Path]) -> str | list[str]:
    """Few tars by name, many by a pattern for each folder and suffix."""
    if len(tars) < 4:
        return folder.shown_all(tars)
    kinds = {
        (path.parent, path.name[path.name.lower().index(".tar") if ".tar" in path.name.lower() else -4 :])
        for path in tars
    }
    return folder.shown_all([parent / f"*{suffix}" for parent, suffix in sorted(kinds)])


def _refuse_boxes(texts: Sequence[Path]) -> None:
    """Refuse the labels of a detector, which are texts of an image's name too."""
    for path in texts[:NUM_LOOKED_AT]:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = [line for line in islice(file, NUM_LOOKED_AT) if line.strip()]
        if not lines or not all(_BOX.fullmatch(line.strip()) for line in lines):
            return
    raise DataError(
        f"{texts[0]} and the other text files hold a class's number and the corners of a box in each line, as "
        "labels of detectors do. They are not answers: write what the images show as texts."
    )


def _with_reasons(folder: Folder, files: Mapping[Path, str]) -> str:
    """Files in words, those of the same reason together."""
    by_reason: dict[str, list[Path]] = {}
    for path, why in files.items():
        by_reason.setdefault(why, []).append(path)
    return "; ".join(f"{folder.few(paths)} ({why})" for why, paths in by_reason.items())


def _pictures(folder: Folder) -> Reading:
    """Pictures with text files, or in folders by class."""
    path, pictures = folder.path, folder.found.pictures
    if not pictures:
        listed = "".join(f"\n  {p.relative_to(path)}: {why}" for p, why in list(folder.found.not_read.items())[:5])
        raise DataError(
            f"{path} holds no images, no {', '.join(METADATA_FILES)}, no other files of rows (JSON, CSV, Parquet, "
            f"Arrow), no .tar files and no {DATASET_INFO}. Name the folder that holds the data.{listed}"
        )
    texts = TextFiles()
    found = dict.fromkeys(text for picture in pictures if (text := texts.path_of(picture, path)))
    sides = _side_folders(path)
    source = {"kind": "image_folder", "path": folder.shown(path), **sides}
    tops = [path / part for part in sides.values()] or [path]
    classes = {picture.parent.name for picture in pictures if picture.parent not in tops}
    if found:
        _refuse_boxes(list(found))
        labels = {"label_column": "label"} if len(classes) > 1 else {}
        return Reading(
            layout=f"images with {len(found)} text files",
            source={**source, **labels},
            prompts=CAPTION_PROMPTS,
            answer="{caption}",
            columns="answer: the text file of each image",
            annotations=tuple(found),
            not_read=dict.fromkeys(folder.found.rows, "text files hold the texts"),
        )
    if len(classes) < 2 or all(name.isdecimal() and len(name) > 2 for name in classes):  # numbers of parts: 000, 001
        others = folder.found.not_read | dict.fromkeys(folder.found.texts, "text of no image")
        raise DataError(
            f"{path}: none of its {len(pictures)} images has a caption or a class. Put a text file next to each image "
            "(a.png, a.txt), the images of each class into a folder of its own, or a metadata.jsonl with `file_name` "
            "and `text` next to them." + (f" Not used: {_with_reasons(folder, others)}." if others else "")
        )
    return Reading(
        layout=f"images in {len(classes)} folders by class",
        source={**source, "caption_column": None, "label_column": "label"},
        prompts=LABEL_PROMPTS,
        answer="{label}",
        columns="answer: the name of the image's folder",
    )
