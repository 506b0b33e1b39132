"""Write a dataset's `defs.yaml` for a folder: what it holds is found by reading it once, as an ingest would."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mllm_assets.artifacts import slug, write_text_atomic
from mllm_assets.data.dataset_info import DATASET_INFO, load_entries
from mllm_assets.data.image_folder import images_below
from mllm_assets.data.metadata_file import FILE_COLUMNS, METADATA_FILES, read_metadata
from mllm_assets.data.preview import Preview, preview
from mllm_assets.data.sources import READERS
from mllm_assets.data.spec import DatasetSpec, SourceSpec, SplitSpec
from mllm_assets.errors import DataError, RecipeError
from mllm_assets.project.read import root_module

COMPONENT = "mllm_assets.components.ImageTextDataset"
TRAIN_FOLDERS, VAL_FOLDERS = ("train", "training"), ("val", "validation", "valid", "dev", "test")
# column names in use, the likeliest first
CAPTIONS = ("text", "caption", "captions", "description", "answer")
LABELS = ("label", "labels", "class", "category", "group")
CONVERSATIONS = ("messages", "conversations")
IMAGES = ("image", "images", "img", "jpg", "png")
CAPTION_PROMPTS = ("Describe this image.", "What do you see in this image?", "What is shown here?")
LABEL_PROMPTS = ("What is shown in this image?", "What kind of picture is this?")
VAL_SHARE = 0.1
# so many samples are decoded at most; of more, some that are spread evenly over all
MAX_CHECKED = 2000
SAFE_SHARE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaffold:
    """A written `defs.yaml`, and what was found of all samples, or of `preview.num_checked` spread over them."""

    name: str
    path: Path
    num_samples: int
    preview: Preview
    entries: tuple[str, str]


def add_dataset(folder: Path, project: Path, root: Path, *, name: str | None = None) -> Scaffold:
    """Find out what a folder holds and declare it as a dataset, with a split that its usable samples can meet.

    Args:
        folder: Images with captions or in folders by class, Parquet or Arrow files, WebDataset tars, or a
            LLaMA-Factory directory.
        project: Where `pyproject.toml` names the package whose `defs/datasets/` gets the file.
        root: What relative paths are relative to (`MLLM_ASSETS_ROOT`).
        name: Of the dataset; by default the folder's.

    Raises:
        DataError: Nothing in the folder is known, a file cannot be read, or fewer than two samples can be used.
        RecipeError: The dataset is declared already, or there is no project.
    """
    if folder.is_file():
        raise DataError(f"{folder} is a file. Name the folder that holds it: {folder.parent}.")
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. Name the folder that holds the images.")
    folder = folder.resolve()
    name = slug(name or folder.name)
    package = root_module(project)
    path = project / package.replace(".", "/") / "defs" / "datasets" / name / "defs.yaml"
    if path.exists():
        raise RecipeError(f"{path} exists already. Edit it, or give another name with --name.")
    source = _source(folder, root)
    has_captions, has_conversations = False, False
    labels: set[str] = set()
    num_samples = 0
    for row in READERS[source["kind"]](SourceSpec(**source), root):
        num_samples += 1
        has_captions |= bool((row.caption or "").strip())
        has_conversations |= row.messages is not None
        labels |= set() if row.label is None or len(labels) > 1 else {row.label}
    by_label = not has_captions and bool(labels)
    if not (has_captions or by_label or has_conversations):
        raise DataError(
            f"{folder}: none of its {num_samples} samples has a caption or a class. Put a text file beside each image "
            "(a.png, a.txt), the images of each class into a folder of its own, or a metadata.jsonl with `file_name` "
            "and `text` beside them."
        )
    if not by_label:
        source.pop("label_column", None)
    attributes = _attributes(name, source, by_label=by_label, conversations=has_conversations)
    spec = _as_spec(attributes)
    every = math.ceil(num_samples / MAX_CHECKED)
    found = preview(spec, islice(READERS[spec.source.kind](spec.source, root), 0, None, every), VAL_SHARE)
    _refuse_unusable(folder, found)
    if spec.source.val_split is None:
        attributes["split"] = _split_sizes(found, num_samples)
        spec = _as_spec(attributes)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({"type": COMPONENT, "attributes": attributes}, sort_keys=False, allow_unicode=True, width=110)
    write_text_atomic(path, text)
    return Scaffold(
        name=name,
        path=path,
        num_samples=num_samples,
        preview=found,
        entries=(spec.train_entry, spec.val_entry),
    )


def _attributes(name: str, source: dict[str, Any], *, by_label: bool, conversations: bool) -> dict[str, Any]:
    attributes: dict[str, Any] = {"name": name, "source": source}
    if by_label:
        source["caption_column"] = None
    if not conversations:
        attributes["prompts"] = list(LABEL_PROMPTS if by_label else CAPTION_PROMPTS)
        attributes["answer"] = "{label}" if by_label else "{caption}"
    return attributes


def _refuse_unusable(folder: Path, found: Preview) -> None:
    if found.num_train and found.num_val:
        return
    if found.num_usable > 1:
        raise DataError(
            f"{folder}: its {found.num_usable} usable samples all look alike, so none could validate without having "
            "been trained on. Add other pictures."
        )
    reasons = "".join(
        f"\n  {count} {reason}, the first: {found.first_rejected[reason]}"
        for reason, count in found.reject_reasons.items()
    )
    raise DataError(
        f"{folder}: {found.num_usable} of {found.num_checked} samples can be used, but a dataset needs at least 2. "
        f"Mend the files, or add others.{reasons}"
    )


def _split_sizes(found: Preview, num_samples: int) -> dict[str, int]:
    """What the samples can give; where only some were looked at, a little less than as many times that."""
    if found.num_checked == num_samples:
        return {"num_train": found.num_train, "num_val": found.num_val}
    times = SAFE_SHARE * num_samples / found.num_checked
    return {"num_train": int(times * found.num_train), "num_val": int(times * found.num_val)}


def _as_spec(attributes: Mapping[str, Any]) -> DatasetSpec:
    """What would be wrong with the YAML is said before it is written."""
    values = dict(attributes)
    values["source"] = SourceSpec(**values["source"])
    values["split"] = SplitSpec(**values.get("split", {}))
    return DatasetSpec(**values)


def _source(folder: Path, root: Path) -> dict[str, Any]:
    """The `source` of the YAML, by what lies in the folder."""
    shown = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder)
    if (folder / DATASET_INFO).is_file():
        return {"kind": "llamafactory", "path": shown, **_sides(load_entries(folder))}
    tables = {"parquet": "parquet", "arrow": "arrow", "tar": "webdataset"}
    metadata = next((folder / name for name in METADATA_FILES if (folder / name).is_file()), None)
    if metadata is not None:
        first = next((row.values for row in read_metadata(metadata) if row.problem is None), {})
        columns = [column for column in first if column not in FILE_COLUMNS]
        return {"kind": "image_folder", "path": shown, **_columns(columns)}
    for suffix, kind in tables.items():
        if any(folder.glob(f"*.{suffix}")):
            pattern = f"{shown}/*.{suffix}"
            if kind == "webdataset":
                return {"kind": kind, "path": pattern, "label_column": "label"}
            return {"kind": kind, "path": pattern, **_table_columns(sorted(folder.glob(f"*.{suffix}"))[0])}
    found: dict[str, Any] = {"kind": "image_folder", "path": shown, "label_column": "label"}
    parts = [next((n for n in names if (folder / n).is_dir()), None) for names in (TRAIN_FOLDERS, VAL_FOLDERS)]
    if all(parts):
        return {**found, "split": parts[0], "val_split": parts[1]}
    if next(images_below(folder), None) is None:
        raise DataError(
            f"{folder} holds no images, no {', '.join(METADATA_FILES)}, no .parquet, .arrow or .tar files and no "
            f"{DATASET_INFO}. Name the folder that holds the data."
        )
    return found


def _sides(entries: Mapping[str, Any]) -> dict[str, str]:
    """A LLaMA-Factory directory's training and validation entry, where their names say which is which."""
    for train in entries:
        stem, _, word = train.rpartition("_")
        if word in TRAIN_FOLDERS:
            for val in (f"{stem}_{other}" if stem else other for other in VAL_FOLDERS):
                if val in entries:
                    return {"split": train, "val_split": val}
    if len(entries) != 1:
        raise DataError(
            f"{DATASET_INFO} holds {len(entries)} entries ({', '.join(list(entries)[:5])}), and their names do not "
            "say which one to take. Write the YAML by hand, with `split` naming the entry."
        )
    return {"split": next(iter(entries))}


def _columns(columns: list[str]) -> dict[str, Any]:
    lower = {column.lower(): column for column in reversed(columns)}

    def first(names: tuple[str, ...]) -> Iterator[str]:
        return (lower[name] for name in names if name in lower)

    if (messages := next(first(CONVERSATIONS), None)) is not None:
        return {"messages_column": messages}
    found: dict[str, Any] = {}
    if (caption := next(first(CAPTIONS), None)) is not None:
        found["caption_column"] = caption
    if (label := next(first(LABELS), None)) is not None:
        found["label_column"] = label
    return found


def _table_columns(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".parquet":
            names = pq.read_schema(path).names
        else:
            with pa.memory_map(str(path)) as data:
                is_file = data.read(6) == b"ARROW1"
                data.seek(0)
                names = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(data).schema.names
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}). Copy it anew.") from error
    images = [name for name in names if name.lower() in IMAGES]
    if not images:
        raise DataError(
            f"{path} has the columns {', '.join(names)}, and none is called {', '.join(IMAGES)}. Write the YAML by "
            "hand, with `image_column`."
        )
    found = {"image_column": images[0], **_columns(names)}
    if not {"caption_column", "messages_column"} & found.keys():
        found["caption_column"] = None
    return found
