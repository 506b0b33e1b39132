"""`data/dataset_info.json`, LLaMA-Factory's list of datasets: add ours, keep everyone else's, read any of them."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from mllm_assets.artifacts import digest_json, path_inside, read_manifest, sha256_file, write_json_atomic
from mllm_assets.data.publish import listed_images
from mllm_assets.data.spec import DatasetSpec
from mllm_assets.errors import DataError, IntegrityError, RecipeError
from mllm_assets.layout import Layout

DATASET_INFO = "dataset_info.json"
# LLaMA-Factory's defaults, which hold where an entry has no `columns` or `tags` block; a block that is there resets
# what it does not list (src/llamafactory/data/parser.py)
DEFAULT_COLUMNS = {"messages": "conversations", "prompt": "instruction", "query": "input", "response": "output"}
REMOTE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
DEFAULT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One dataset of `dataset_info.json`; `columns` and `tags` as LLaMA-Factory reads them.

    `remote` is the key that names a place other than a local file, where there is one: it wins over `file_name`.
    """

    name: str
    file_name: str = ""
    remote: str | None = None
    formatting: str = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    num_samples: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """The entries a dataset registered; `digest` covers them and the files and images they name."""

    entries: dict[str, dict[str, Any]]
    digest: str


def build_entry(file_name: str) -> dict[str, Any]:
    """An entry for one of our files, with every column and tag that it uses."""
    return {
        "file_name": file_name,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }


def register(spec: DatasetSpec, layout: Layout, version_dir: Path) -> DatasetInfo:
    """Write a dataset's two entries under the file lock; other entries are kept as they are.

    Raises:
        RecipeError: An entry of that name belongs to another file.
        IntegrityError: The version is unfinished, or an image it names is missing or damaged.
        DataError: `dataset_info.json` is not JSON; names the line.
    """
    manifest = read_manifest(version_dir)
    for name, expected in listed_images(version_dir):
        path = layout.data / name
        if not path.is_file() or sha256_file(path) != expected:
            raise IntegrityError(
                f"{path} is missing or damaged, but {version_dir.name} of dataset {spec.name!r} names it. "
                f"Materialise {spec.name}/train again."
            )
    entries = {
        spec.train_entry: build_entry(f"{spec.name}/train.{spec.output.format}"),
        spec.val_entry: build_entry(f"{spec.name}/val.{spec.output.format}"),
    }
    write_entries(layout, spec.name, entries)
    digest = digest_json([entries, manifest["files"]])[:16]
    return DatasetInfo(entries=entries, digest=digest)


def write_entries(layout: Layout, dataset: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a dataset's entries under the file lock; raises as `register`."""
    layout.data.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{layout.dataset_info}.lock"):
        existing = _read(layout.data) if layout.dataset_info.exists() else {}
        for name in entries:
            other = existing.get(name)
            if other is not None and not str(other.get("file_name")).startswith(f"{dataset}/"):
                raise RecipeError(
                    f"{layout.dataset_info}: the entry {name!r} belongs to {other.get('file_name')!r}, but dataset "
                    f"{dataset!r} would write it too. Set train_entry and val_entry in its YAML, or remove the entry."
                )
        # what a user added to an entry of ours, such as `num_samples`, is kept like all that is not ours
        merged = {name: {**existing.get(name, {}), **entry} for name, entry in entries.items()}
        if {**existing, **merged} != existing:
            write_json_atomic(layout.dataset_info, {**existing, **merged})


def load_entries(data_dir: Path) -> dict[str, Entry]:
    """All entries of a `dataset_dir`.

    Raises:
        DataError: The file is missing, is not JSON (names the line) or an entry has no local file.
    """
    return {name: _parse(name, value, data_dir / DATASET_INFO) for name, value in _read(data_dir).items()}


def load_entry(data_dir: Path, name: str) -> Entry:
    """One entry.

    Raises:
        RecipeError: There is no such entry; names the nearest.
        DataError: As `load_entries`.
    """
    found = _read(data_dir)
    if name not in found:
        near = difflib.get_close_matches(name, found, n=3)
        hint = f"The nearest are {', '.join(near)}. " if near else ""
        raise RecipeError(
            f"{data_dir / DATASET_INFO} has no dataset {name!r}. {hint}Correct `dataset` or `eval_dataset` in the "
            "recipe, or materialise the dataset first."
        )
    return _parse(name, found[name], data_dir / DATASET_INFO)


def entry_file(data_dir: Path, entry: Entry) -> Path:
    """The entry's file, inside `data_dir`."""
    return path_inside(data_dir, entry.file_name, what=f"Entry {entry.name!r} of {data_dir / DATASET_INFO}")


def _read(data_dir: Path) -> dict[str, Any]:
    path = data_dir / DATASET_INFO
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"There is no {path}. Materialise a dataset's dataset_info asset, or set `dataset_dir` to the folder "
            "that holds it."
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}. Correct the JSON there."
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            f"{path}: expected an object of datasets by name, got {type(value).__name__}. Correct the file."
        )
    return value


def _parse(name: str, value: Any, path: Path) -> Entry:
    if not isinstance(value, dict):
        raise DataError(f"{path}: entry {name!r} should be an object, got {type(value).__name__}. Correct the file.")
    remote = next((key for key in REMOTE_KEYS if value.get(key)), None)
    if not isinstance(value.get("file_name"), str) and remote is None:
        raise DataError(
            f"{path}: entry {name!r} has no `file_name`. Name its file, relative to {path.parent}, or remove the entry."
        )
    return Entry(
        name=name,
        file_name=value.get("file_name") or "",
        remote=remote,
        formatting=value.get("formatting", "alpaca"),
        ranking=bool(value.get("ranking", False)),
        subset=value.get("subset"),
        split=value.get("split", "train"),
        folder=value.get("folder"),
        columns=_block(value, "columns", DEFAULT_COLUMNS, name, path),
        tags=_block(value, "tags", DEFAULT_TAGS, name, path),
        num_samples=value.get("num_samples"),
    )


def _block(value: dict[str, Any], key: str, default: dict[str, str], name: str, path: Path) -> dict[str, str]:
    block = value.get(key, default)
    if not isinstance(block, dict) or not all(isinstance(item, str | None) for item in block.values()):
        raise DataError(f"{path}: `{key}` of entry {name!r} should map names to texts. Correct the file.")
    return {name: item for name, item in block.items() if item is not None}
