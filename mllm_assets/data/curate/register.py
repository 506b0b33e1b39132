"""Register a dataset's entries in `data/dataset_info.json`, after checking the images that they name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from mllm_assets.artifacts import digest_json, read_manifest, sha256_file, write_json_atomic
from mllm_assets.data.curate.publish import side_files, split_file
from mllm_assets.data.ingest.spec import OUTPUT_FORMATS, DatasetSpec
from mllm_assets.data.ingest.split_spec import TEST, VAL
from mllm_assets.data.sharegpt.dataset import Dataset, listed_images
from mllm_assets.data.sharegpt.entries import ENTRY_KEYS, read_dataset_info
from mllm_assets.errors import IntegrityError, RecipeError
from mllm_assets.layout import Layout
from mllm_assets.progress import doing


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """The entries a dataset registered; `digest` covers them and the files and images they name."""

    entries: dict[str, dict[str, Any]]
    digest: str


def build_entry(file_name: str) -> dict[str, Any]:
    """An entry for a file written here, with every column and tag that it uses."""
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


@doing("compare the images with their digests")
def register(spec: DatasetSpec, layout: Layout, version_dir: Path) -> DatasetInfo:
    """Write an entry for each side that a version has, under the file lock; other datasets' entries are kept.

    Raises:
        RecipeError: An entry of that name belongs to another file.
        IntegrityError: The version is unfinished, or an image it names is missing or damaged.
        DataError: `dataset_info.json` is not JSON; names the line.
    """
    for name, expected in listed_images(version_dir):
        path = layout.data / name
        if not path.is_file() or sha256_file(path) != expected:
            raise IntegrityError(
                f"{path} is missing or damaged, but {version_dir.name} of dataset {spec.name!r} names it. "
                f"Materialise {spec.name}/train again."
            )
    entries = {
        spec.entries[side]: build_entry(f"{spec.name}/{path.name}")
        for side, path in side_files(version_dir, spec.output.format).items()
    }
    write_entries(layout, spec.name, entries)
    return DatasetInfo(entries=entries, digest=info_digest(entries, version_dir))


def judging_entries(dataset: Dataset, eval_entries: Iterable[str]) -> tuple[str, ...]:
    """The entries that a model is judged by: instead of a dataset's validation split its test split, if it has one.

    Any other evaluation entry judges too, although it has chosen already.
    """
    judging = []
    for name in eval_entries:
        entry = dataset.entry(name)
        spec = read_manifest(entry.version).get("spec", {}) if entry.version else {}
        has_test = entry.version and (entry.version / split_file(TEST, entry.file.suffix[1:])).is_file()
        judging.append(spec["test_entry"] if has_test and entry.file.stem == VAL else name)
    return tuple(dict.fromkeys(judging))


def info_digest(entries: Any, version_dir: Path) -> str:
    """Identifies a dataset's entries together with the files of the version that they name."""
    return digest_json([entries, read_manifest(version_dir)["files"]])[:16]


def write_entries(layout: Layout, dataset: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a dataset's entries under the file lock, and take out that of a test file that it no longer has.

    Raises as `register`.
    """
    layout.data.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{layout.dataset_info}.lock"):
        existing = read_dataset_info(layout.data) if layout.dataset_info.exists() else {}
        for name in entries:
            other = existing.get(name)
            if other is not None and not str(other.get("file_name")).startswith(f"{dataset}/"):
                raise RecipeError(
                    f"{layout.dataset_info}: the entry {name!r} belongs to {other.get('file_name')!r}, but dataset "
                    f"{dataset!r} would write it too. Set train_entry and val_entry in its YAML, or remove the entry."
                )
        # keys that a user added to such an entry, for example `num_samples`, are kept; one that nothing reads is
        # damage, and would make the entry unusable
        known = {name: {k: v for k, v in existing.get(name, {}).items() if k in ENTRY_KEYS} for name in entries}
        merged = {name: {**known[name], **entry} for name, entry in entries.items()}
        test_files = {f"{dataset}/{split_file(TEST, format)}" for format in OUTPUT_FORMATS}
        gone = test_files - {entry["file_name"] for entry in entries.values()}
        written = {n: entry for n, entry in {**existing, **merged}.items() if entry.get("file_name") not in gone}
        if written != existing:
            write_json_atomic(layout.dataset_info, written)
