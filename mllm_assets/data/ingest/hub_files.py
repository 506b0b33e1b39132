"""Which Parquet files of a Hub dataset hold a split: by the dataset card where it says so, otherwise by their names."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.data.sharegpt.row_files import rows_at_once
from mllm_assets.errors import SourceError
from mllm_assets.hub.client import find_repo, find_sizes, read_range
from mllm_assets.hub.errors import HubRepo, NoSuchRevision

CONVERTED = "refs/convert/parquet"  # where the Hub keeps its own Parquet conversion of any dataset
# a column of a row group is read in parts of this size, so that one of gigabytes costs little memory
BUFFER_BYTES = 8 * 2**20
FOOTER_BYTES = 64 * 2**10  # what Arrow reads first, and all that it needs of most files
BATCH_ROWS = 64


def find_split_files(hub: HubRepo, source: SourceSpec) -> tuple[str, dict[str, int]]:
    """The commit of the revision, and the split's files in their order with their sizes in bytes.

    A repository without any Parquet file, whose conversion the Hub has not either, has none.

    Raises:
        SourceError: The Hub does not answer, or there are no such files. Says what to do.
    """
    info = own = find_repo(hub)
    files = _files_of(info, source)
    if not files and source.revision is None:
        with suppress(NoSuchRevision):
            info = find_repo(hub, revision=CONVERTED)
            files = _files_of(info, source, converted=True)
    if not files and not any(item.rfilename.endswith(".parquet") for item in own.siblings or ()):
        return own.sha, {}
    if not files:
        subset = f" of the subset {source.subset!r}" if source.subset else ""
        raise SourceError(
            f"{source.repo} at {info.sha} has no Parquet files of the split {source.split!r}{subset}. Correct "
            f"source.split, or set source.revision to {CONVERTED!r} for the Hub's own Parquet conversion, or write "
            "the dataset to Parquet yourself and use a source of kind 'parquet'."
        )
    return info.sha, find_sizes(hub, info.sha, files)


def _files_of(info: Any, source: SourceSpec, *, converted: bool = False) -> list[str]:
    names = sorted(item.rfilename for item in info.siblings or () if item.rfilename.endswith(".parquet"))
    configs = getattr(info.card_data, "configs", None) or []
    if converted or source.revision == CONVERTED:
        # <subset>/<split>/0000.parquet
        subset = _chosen_subset([{"config_name": name.split("/")[0]} for name in names], source)
        return split_files([name for name in names if name.startswith(f"{subset.get('config_name')}/")], source.split)
    config = _chosen_subset(configs, source)
    if "data_files" in config:
        return _matching(names, _patterns(config["data_files"], source.split))
    folder = config.get("data_dir") or (source.subset if not configs else None)
    prefix = f"{_plain(folder)}/" if folder else ""
    return split_files([name for name in names if name.startswith(prefix)], source.split)


def _chosen_subset(configs: Sequence[Mapping[str, Any]], source: SourceSpec) -> Mapping[str, Any]:
    by_name = {str(config.get("config_name")): config for config in configs}
    if source.subset in by_name or len(by_name) <= 1 and source.subset is None:
        return by_name[source.subset] if source.subset else next(iter(by_name.values()), {})
    default = [config for name, config in by_name.items() if config.get("default") or name == "default"]
    if source.subset is None and default:
        return default[0]
    if not by_name:
        return {}
    raise SourceError(
        f"{source.repo} has the subsets {', '.join(sorted(by_name))}. Set source.subset to one of them in the "
        "dataset's YAML."
    )


def _patterns(data_files: Any, split: str) -> list[str]:
    """The patterns of one split, in any form that a dataset card may have: text, list of texts, list of splits."""
    if isinstance(data_files, str):
        data_files = [data_files]
    if all(isinstance(item, str) for item in data_files):
        return list(data_files) if split == "train" else []
    paths = [item.get("path", []) for item in data_files if item.get("split") == split]
    return [pattern for path in paths for pattern in ([path] if isinstance(path, str) else path)]


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    from fsspec.utils import glob_translate

    compiled = [re.compile(glob_translate(_plain(pattern))) for pattern in patterns]
    return list(dict.fromkeys(name for pattern in compiled for name in names if pattern.fullmatch(name)))


def _plain(path: str) -> str:
    return path.removeprefix("./").strip("/")


def split_files(names: Sequence[str], split: str) -> list[str]:
    """The Parquet files of a split, by the Hub's naming: `data/train-0-of-2.parquet`, `default/train/0.parquet`.

    Files whose names contain no split count as "train".
    """
    files = sorted(name for name in names if name.endswith(".parquet"))
    matching = [name for name in files if re.search(rf"(^|[/_.-]){re.escape(split)}([/_.-])", name)]
    if not matching and split == "train":
        other = re.compile(r"(^|[/_.-])(validation|valid|val|test|dev)([/_.-])")
        matching = [name for name in files if not other.search(name)]
    return matching


class HubFile(io.RawIOBase):
    """A file of a repository at one commit, of known size."""

    def __init__(self, hub: HubRepo, commit: str, name: str, num_bytes: int):
        self._hub, self._commit, self.name, self._num_bytes = hub, commit, name, num_bytes
        self._position = 0
        self._held, self._held_from = b"", 0

    def hold(self, start: int, stop: int) -> None:
        """Read a part with one request and serve the reads inside it from memory; replaces the part held before."""
        self._held, self._held_from = b"", 0
        self._held, self._held_from = self._fetch(start, stop), start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._num_bytes if size < 0 else min(self._position + size, self._num_bytes)
        if stop <= self._position:
            return b""
        data = self._fetch(self._position, stop)
        self._position = stop
        return data

    def _fetch(self, start: int, stop: int) -> bytes:
        if self._held_from <= start and stop <= self._held_from + len(self._held):
            return self._held[start - self._held_from : stop - self._held_from]
        parts = [(at, min(at + BUFFER_BYTES, stop)) for at in range(start, stop, BUFFER_BYTES)]
        return b"".join(read_range(self._hub, self._commit, self.name, *part) for part in parts)


class HubParquet:
    """A Parquet file on the Hub: its footer is read once, and only the row groups that are asked for."""

    def __init__(self, hub: HubRepo, commit: str, name: str, num_bytes: int):
        """Read the footer.

        Raises:
            SourceError: The Hub does not return it, or it is not a Parquet file.
        """
        self.name = name
        self._hub, self._file = hub, HubFile(hub, commit, name, num_bytes)
        self._file.hold(max(num_bytes - FOOTER_BYTES, 0), num_bytes)
        with self._named_if_damaged():
            self.metadata = pq.read_metadata(self._file)
        self.schema = self.metadata.schema.to_arrow_schema()
        self._file.hold(0, 0)

    @property
    def num_rows(self) -> int:
        return self.metadata.num_rows

    def num_group_bytes(self, group: int, columns: Sequence[str]) -> int:
        """Compressed size of some columns of a row group."""
        return sum(stop - start for start, stop in self._column_ranges(group, columns))

    def batches(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a row group, a few at a time; a small group is one request, a large one is read page by page.

        Raises:
            SourceError: The Hub does not return them, or they are damaged.
        """
        ranges = self._column_ranges(group, columns)
        start, stop = min(start for start, _ in ranges), max(stop for _, stop in ranges)
        if stop - start <= BUFFER_BYTES:
            self._file.hold(start, stop)
        with self._named_if_damaged():
            reader = pq.ParquetFile(self._file, metadata=self.metadata, buffer_size=BUFFER_BYTES, pre_buffer=False)
            num_rows = rows_at_once(reader, BATCH_ROWS, group)
            yield from reader.iter_batches(num_rows, row_groups=[group], columns=list(columns), use_threads=False)
        self._file.hold(0, 0)

    def _column_ranges(self, group: int, columns: Sequence[str]) -> list[tuple[int, int]]:
        parts = self.metadata.row_group(group)
        chunks = (parts.column(number) for number in range(parts.num_columns))
        needed = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
        starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in needed]
        return [(start, start + c.total_compressed_size) for start, c in zip(starts, needed, strict=True)]

    @contextmanager
    def _named_if_damaged(self) -> Iterator[None]:
        try:
            yield
        except pa.ArrowException as error:
            raise SourceError(
                f"{self.name} of {self._hub.repo} cannot be read as Parquet ({str(error).splitlines()[0]}). Set "
                f"another revision next to {self._hub.setting}, or tell the dataset's owner."
            ) from error
