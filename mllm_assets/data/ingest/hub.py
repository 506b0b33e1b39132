"""Read a Hugging Face dataset's Parquet files at one commit, and only as many row groups as the splits need.

Reading goes over HTTP ranges in small parts, so 550 samples of a dataset of gigabytes cost a few hundred megabytes
of traffic at most, and little memory. No code of a dataset repository is ever run. Repositories without Parquet files
are read by `hub_stream`.
"""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mllm_assets.data.ingest.hub_files import HubParquet, find_split_files
from mllm_assets.data.ingest.hub_stream import stream_rows
from mllm_assets.data.ingest.source_rows import RowReader, SourceRow, class_names, needed_columns
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.sharegpt.pictures import MediaFolders
from mllm_assets.data.sharegpt.row_files import rows_of
from mllm_assets.errors import SourceError
from mllm_assets.hub.errors import HubRepo

Choice = Callable[[int], Collection[int]]
# rejects and duplicates take samples away: fetch a fifth more than the splits ask for
SLACK = 1.2
# sample from more row groups than needed, up to this size: ethz/food101 is sorted by class, 100 rows a group
SPREAD_BYTES = 256 * 2**20
# sample from this many files, or more where they hold too few rows
SPREAD_FILES = 32
NUM_CONNECTIONS = 8
WITHDRAWN = {
    "lambdalabs/pokemon-blip-captions": "It was withdrawn from the Hub in 2024 (huggingface/diffusers#7879), so set "
    "source.repo to another dataset with images and captions. "
}
EMBEDDED = "The embedded dataset needs no network: use the emoji dataset (source.path 'package:emoji.parquet')."


@dataclass(frozen=True, slots=True)
class _RowGroup:
    file: HubParquet
    index: int
    first_row: int
    first_row_of_file: int
    num_rows: int
    num_bytes: int

    @property
    def rows(self) -> range:
        return range(self.first_row, self.first_row + self.num_rows)


def dataset_repo(source: SourceSpec, endpoint: str | None = None) -> HubRepo:
    return HubRepo(
        kind="dataset",
        repo=source.repo,
        revision=source.revision,
        setting="source.repo in the dataset's YAML",
        known=WITHDRAWN.get(source.repo, ""),
        otherwise=EMBEDDED,
        endpoint=endpoint,
    )


def read_hub(
    spec: DatasetSpec, *, endpoint: str | None = None, choose: Choice | None = None
) -> tuple[str, Iterator[SourceRow]]:
    """Pin the revision and read rows of one split, by default a sample of it.

    The sample depends on the commit, the sizes and the seed only. It is drawn from some of the files and row groups,
    and only those are read; a row's index is then its position in these files.

    Args:
        spec: Names repository, revision, split and columns; its sizes and seed choose the rows.
        endpoint: Another Hub than the default one.
        choose: Takes the number of rows in the split and returns the indices of those to read, in the order of its
            files; a `range` reads all. Every file's footer is read for that, and the chosen rows.

    Returns:
        The commit, and the rows in the order of the source.

    Raises:
        SourceError: The dataset is unreachable (within 10 s), unknown, gated or withdrawn, or has no Parquet files of
            the split; says what to do.
        DataError: A file lacks a column that the spec names.
    """
    hub = dataset_repo(spec.source, endpoint)
    commit, files = find_split_files(hub, spec.source)
    if not files:
        if choose is not None:
            raise SourceError(
                f"{spec.source.repo} has no Parquet files, so that its number of rows is unknown, and the split "
                "'guide' shuffles all of them. Use the strategy 'grouped'."
            )
        return commit, stream_rows(spec.source, hub, commit, _num_needed(spec))
    return commit, _read_rows(spec, hub, commit, files, choose)


def _read_rows(
    spec: DatasetSpec, hub: HubRepo, commit: str, files: dict[str, int], choose: Choice | None
) -> Iterator[SourceRow]:
    needed = _num_needed(spec)
    readers = _open_files(hub, commit, files, None if choose else needed, seed=spec.split.seed)
    groups = list(_row_groups(readers, spec.source))
    if choose is None:
        groups = _choose_groups(spec, groups, needed)
        kept = _choose_rows(spec, groups, needed)
    else:
        kept = choose(sum(reader.num_rows for reader in readers))
        kept = kept if isinstance(kept, range) else set(kept)
    for group in sorted(groups, key=lambda group: group.first_row):
        yield from _rows_of_group(group, kept, spec.source)


def _num_needed(spec: DatasetSpec) -> int:
    return math.ceil(SLACK * spec.split.num_wanted)


def _open_files(hub: HubRepo, commit: str, files: dict[str, int], needed: int | None, *, seed: int) -> list[HubParquet]:
    """Read the footers of all files, or of enough for a sample; in the source's order."""
    order = sorted(files, key=lambda name: _rank(seed, name))
    readers: list[HubParquet] = []
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        while order and (needed is None or sum(reader.num_rows for reader in readers) < needed):
            now, order = order[:SPREAD_FILES], order[SPREAD_FILES:]
            readers += pool.map(lambda name: HubParquet(hub, commit, name, files[name]), now)
    places = {name: place for place, name in enumerate(files)}
    return sorted(readers, key=lambda reader: places[reader.name])


def _row_groups(readers: Sequence[HubParquet], source: SourceSpec) -> Iterator[_RowGroup]:
    first_row = 0
    for reader in readers:
        first_row_of_file = first_row
        columns = needed_columns(source, reader.schema, f"{reader.name} of {source.repo}")
        for index in range(reader.metadata.num_row_groups):
            num_rows = reader.metadata.row_group(index).num_rows
            yield _RowGroup(
                reader, index, first_row, first_row_of_file, num_rows, reader.num_group_bytes(index, columns)
            )
            first_row += num_rows


def _choose_groups(spec: DatasetSpec, groups: Sequence[_RowGroup], needed: int) -> list[_RowGroup]:
    chosen: list[_RowGroup] = []
    num_rows = num_bytes = 0
    for group in sorted(groups, key=lambda group: _rank(spec.split.seed, f"{group.file.name} {group.index}")):
        if num_rows >= needed and num_bytes + group.num_bytes > SPREAD_BYTES:
            break
        chosen.append(group)
        num_rows += group.num_rows
        num_bytes += group.num_bytes
    return chosen


def _choose_rows(spec: DatasetSpec, groups: Sequence[_RowGroup], needed: int) -> set[int]:
    rows = [(f"{group.file.name} {group.index} {row - group.first_row}", row) for group in groups for row in group.rows]
    return {row for _, row in sorted(rows, key=lambda item: _rank(spec.split.seed, item[0]))[:needed]}


def _rows_of_group(group: _RowGroup, kept: Collection[int], source: SourceSpec) -> Iterator[SourceRow]:
    wanted = [row for row in group.rows if row in kept]
    if not wanted:
        return
    schema = group.file.schema
    columns = needed_columns(source, schema, source.repo)
    reader = RowReader(source, MediaFolders(()), class_names(schema))
    start = group.first_row
    for batch in group.file.batches(group.index, columns):
        rows = wanted[bisect_left(wanted, start) : bisect_left(wanted, start + batch.num_rows)]
        chosen = batch.take([row - start for row in rows])
        for row, values in zip(rows, rows_of(chosen), strict=True):
            location = f"{group.file.name}:row {row - group.first_row_of_file}"
            yield from reader.read(values, SourceRow(row_index=row, location=location))
        start += batch.num_rows
        if start > wanted[-1]:
            return


def _rank(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed} {key}".encode()).hexdigest()
