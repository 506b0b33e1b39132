"""Read a Hugging Face dataset: its Parquet files at one commit, and of those only row groups enough for the splits.

Reading goes over HTTP ranges, so 550 samples of a dataset of gigabytes cost a few hundred megabytes at most. No code
of a dataset repository is ever run, and `HF_TOKEN` is the only credential looked at.
Not covered: repositories of loose image files without the Hub's own Parquet conversion; several configurations.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.data.rows import SourceRow, class_names, needed_columns, rows_of_batch
from mllm_assets.data.spec import DatasetSpec, SourceSpec
from mllm_assets.errors import SourceError
from mllm_assets.hub import REACH_TIMEOUT_S, REQUEST_TIMEOUT_S, HubRepo, explained, within

# rejects and duplicates take samples away: fetch a fifth more than the splits ask for
SLACK = 1.2
# more row groups than needed are sampled from, up to this: ethz/food101 is sorted by class, 100 rows a group
SPREAD_BYTES = 256 * 2**20
MAX_FILES = 32
CONVERTED = "refs/convert/parquet"
WITHDRAWN = {
    "lambdalabs/pokemon-blip-captions": "It was withdrawn from the Hub in 2024 (huggingface/diffusers#7879), so set "
    "source.repo to another dataset with images and captions. "
}
EMBEDDED = "The embedded dataset needs no network: use the emoji dataset (source.path 'package:emoji.parquet')."


@dataclass(frozen=True, slots=True)
class _RowGroup:
    file: str
    index: int
    first_row: int
    num_rows: int
    num_bytes: int


def read_hub(spec: DatasetSpec, *, endpoint: str | None = None) -> tuple[str, Iterator[SourceRow]]:
    """Pin the revision and sample rows of one split; the choice depends on the commit, sizes and seed only.

    Args:
        spec: Names repository, revision, split and columns; its sizes and seed choose the rows.
        endpoint: Another Hub than the default one.

    Returns:
        The commit, and the rows in the order of the source.

    Raises:
        SourceError: Unreachable (within 10 s), unknown, gated or withdrawn, or no Parquet files of the split; says
            what to do.
    """
    from huggingface_hub import HfApi, HfFileSystem

    source, hub = spec.source, _hub_repo(spec.source)
    token = os.environ.get("HF_TOKEN") or False
    api = HfApi(endpoint=endpoint, token=token)
    commit, files = explained(hub, lambda: within(REACH_TIMEOUT_S, lambda: _find_files(api, source)))
    system = HfFileSystem(endpoint=endpoint, token=token, skip_instance_cache=True)
    return commit, _read_rows(spec, system, commit, files)


def _hub_repo(source: SourceSpec) -> HubRepo:
    return HubRepo(
        kind="dataset",
        repo=source.repo,
        revision=source.revision,
        setting="source.repo in the dataset's YAML",
        known=WITHDRAWN.get(source.repo, ""),
        otherwise=EMBEDDED,
    )


def _find_files(api: Any, source: SourceSpec) -> tuple[str, list[str]]:
    info = api.dataset_info(source.repo, revision=source.revision, timeout=REQUEST_TIMEOUT_S)
    files = split_files([item.rfilename for item in info.siblings or ()], source.split)
    if not files and source.revision is None:
        info = api.dataset_info(source.repo, revision=CONVERTED, timeout=REQUEST_TIMEOUT_S)
        files = split_files([item.rfilename for item in info.siblings or ()], source.split)
    if not files:
        raise SourceError(
            f"{source.repo} at {info.sha} has no Parquet files of the split {source.split!r}. Correct source.split or "
            "source.revision, or write the dataset to Parquet yourself and use a source of kind 'parquet'."
        )
    return info.sha, files


def split_files(names: list[str], split: str) -> list[str]:
    """The Parquet files of a split, by the Hub's naming: `data/train-0-of-2.parquet`, `default/train/0.parquet`.

    Files that name no split at all count as "train".
    """
    files = sorted(name for name in names if name.endswith(".parquet"))
    matching = [name for name in files if re.search(rf"(^|[/_.-]){re.escape(split)}([/_.-])", name)]
    if not matching and split == "train":
        other = re.compile(r"(^|[/_.-])(validation|valid|val|test|dev)([/_.-])")
        matching = [name for name in files if not other.search(name)]
    return matching


def _read_rows(spec: DatasetSpec, system: Any, commit: str, files: list[str]) -> Iterator[SourceRow]:
    source, hub = spec.source, _hub_repo(spec.source)
    order = sorted(files, key=lambda name: _rank(spec, name))[:MAX_FILES]

    def opened() -> dict[str, pq.ParquetFile]:
        paths = {name: f"datasets/{source.repo}@{commit}/{name}" for name in sorted(order)}
        return {name: pq.ParquetFile(system.open(path, "rb"), pre_buffer=True) for name, path in paths.items()}

    readers = explained(hub, opened)
    first = next(iter(readers.values())).schema_arrow
    columns = needed_columns(source, first, source.repo)
    names = class_names(first, source.label_column)
    needed = math.ceil(SLACK * (spec.split.num_train + spec.split.num_val))
    chosen = _choose_groups(spec, _row_groups(readers, columns), needed)
    kept = _choose_rows(spec, chosen, needed)
    for group in sorted(chosen, key=lambda group: group.first_row):

        def fetched(group: _RowGroup = group) -> pa.Table:
            return readers[group.file].read_row_group(group.index, columns=columns)

        rows = sorted(row for row in kept if group.first_row <= row < group.first_row + group.num_rows)
        if rows:
            table = explained(hub, fetched).take([row - group.first_row for row in rows])
            for batch in table.to_batches(max_chunksize=64):
                yield from rows_of_batch(batch, source, names, rows[: batch.num_rows], source.repo)
                rows = rows[batch.num_rows :]


def _row_groups(readers: dict[str, pq.ParquetFile], columns: list[str]) -> list[_RowGroup]:
    groups = []
    first_row = 0
    for name, reader in readers.items():
        for index in range(reader.metadata.num_row_groups):
            group = reader.metadata.row_group(index)
            parts = [group.column(number) for number in range(group.num_columns)]
            num_bytes = sum(p.total_compressed_size for p in parts if p.path_in_schema.split(".")[0] in columns)
            groups.append(_RowGroup(name, index, first_row, group.num_rows, num_bytes))
            first_row += group.num_rows
    return groups


def _choose_groups(spec: DatasetSpec, groups: list[_RowGroup], needed: int) -> list[_RowGroup]:
    chosen: list[_RowGroup] = []
    num_rows = num_bytes = 0
    for group in sorted(groups, key=lambda group: _rank(spec, f"{group.file} {group.index}")):
        if num_rows >= needed and num_bytes + group.num_bytes > SPREAD_BYTES:
            break
        chosen.append(group)
        num_rows += group.num_rows
        num_bytes += group.num_bytes
    return chosen


def _choose_rows(spec: DatasetSpec, groups: list[_RowGroup], needed: int) -> set[int]:
    rows = [row for group in groups for row in range(group.first_row, group.first_row + group.num_rows)]
    return set(sorted(rows, key=lambda row: _rank(spec, f"row {row}"))[:needed])


def _rank(spec: DatasetSpec, key: str) -> str:
    return hashlib.sha256(f"{spec.split.seed} {key}".encode()).hexdigest()
