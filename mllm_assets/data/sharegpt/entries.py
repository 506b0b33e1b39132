"""`data/dataset_info.json`, LLaMA-Factory's list of datasets: add ours, keep everyone else's, read any of them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import path_inside
from mllm_assets.data.sharegpt.json_text import JsonLimits, decode, read_text
from mllm_assets.errors import DataError, RecipeError, nearest

DATASET_INFO = "dataset_info.json"
MAX_INFO_BYTES = 16 * 2**20
OR_REPAIR = "; or mllm-assets doctor --repair keeps the file and writes the entries of the project's datasets again."
# LLaMA-Factory's defaults, for entries without a `columns` or `tags` block; an existing block resets what it does not
# list (src/llamafactory/data/parser.py)
DEFAULT_COLUMNS = {"messages": "conversations", "prompt": "instruction", "query": "input", "response": "output"}
COLUMNS = (
    *DEFAULT_COLUMNS, "history", "system", "tools", "images", "videos", "audios", "chosen", "rejected", "kto_tag"
)  # fmt: skip
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
ENTRY_KEYS = (
    "file_name", "formatting", "ranking", "subset", "split", "folder", "columns", "tags", "num_samples", *REMOTE_KEYS
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryInfo:
    """One dataset of `dataset_info.json`; `columns` and `tags` as LLaMA-Factory reads them.

    `remote` is the key that names a source other than a local file, if any: it wins over `file_name`.
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
    unknown_keys: tuple[str, ...] = ()


def load_entries(data_dir: Path) -> dict[str, EntryInfo]:
    """All entries of a `dataset_dir`.

    Raises:
        DataError: The file is missing, is not JSON (names the line) or an entry has no local file.
    """
    return {name: _parse(name, value, data_dir / DATASET_INFO) for name, value in read_dataset_info(data_dir).items()}


def load_entry(data_dir: Path, name: str) -> EntryInfo:
    """One entry.

    Raises:
        RecipeError: No entry has this name; names the nearest.
        DataError: As `load_entries`.
    """
    found = read_dataset_info(data_dir)
    if name not in found:
        near = nearest(name, found, most=3)
        hint = f"The nearest are {', '.join(near)}. " if near else ""
        raise RecipeError(
            f"{data_dir / DATASET_INFO} has no dataset {name!r}. {hint}Correct `dataset` or `eval_dataset` in the "
            "recipe, or materialise the dataset first."
        )
    return _parse(name, found[name], data_dir / DATASET_INFO)


def entry_file(data_dir: Path, entry: EntryInfo) -> Path:
    """The entry's file, inside `data_dir`."""
    return path_inside(data_dir, entry.file_name, what=f"Entry {entry.name!r} of {data_dir / DATASET_INFO}")


def read_dataset_info(data_dir: Path) -> dict[str, Any]:
    """The entries as they are written; raises DataError if the file is missing or not JSON."""
    path = data_dir / DATASET_INFO
    try:
        value = decode(read_text(path, JsonLimits(max_file_bytes=MAX_INFO_BYTES)), path, 1)
    except OSError:
        if os.path.lexists(path):
            raise DataError(
                f"{path} is not a file that can be read. Run mllm-assets doctor --repair, which keeps it and writes "
                "the entries of the project's datasets again."
            ) from None
        raise DataError(
            f"There is no {path}. Make a dataset (mllm-assets run DATASET), or set `dataset_dir` to the folder "
            "that holds it."
        ) from None
    except DataError as error:
        raise DataError(f"{str(error).removesuffix('.')}{OR_REPAIR}") from None
    if not isinstance(value, dict):
        raise DataError(
            f"{path}: expected an object of datasets by name, got {type(value).__name__}. Correct the file."
        )
    return value


def _parse(name: str, value: Any, path: Path) -> EntryInfo:
    if not isinstance(value, dict):
        raise DataError(f"{path}: entry {name!r} should be an object, got {type(value).__name__}. Correct the file.")
    remote = next((key for key in REMOTE_KEYS if value.get(key)), None)
    if not isinstance(value.get("file_name"), str) and remote is None:
        raise DataError(
            f"{path}: entry {name!r} has no `file_name`. Name its file, relative to {path.parent}, or remove the entry."
        )
    return EntryInfo(
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
        unknown_keys=tuple(key for key in value if key not in ENTRY_KEYS),
    )


def _block(value: dict[str, Any], key: str, default: dict[str, str], name: str, path: Path) -> dict[str, str]:
    block = value.get(key, default)
    if not isinstance(block, dict) or not all(isinstance(item, str | None) for item in block.values()):
        raise DataError(f"{path}: `{key}` of entry {name!r} should map names to texts. Correct the file.")
    return {name: item for name, item in block.items() if item is not None}
