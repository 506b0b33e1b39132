"""Read a Hub dataset that has no Parquet files through `datasets`' streaming, at one commit.

These are loose pictures with or without metadata, WebDataset tars, JSON and CSV.
Rows come in the order of the source, and only as many as the splits need are read; pictures are not decoded. No code of
a dataset repository is ever run: this version of `datasets` knows none.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from mllm_assets.data.ingest.hub_files import CONVERTED, HubFile
from mllm_assets.data.ingest.source_rows import RowReader, SourceRow, require_named
from mllm_assets.data.ingest.spec import MAX_IMAGE_BYTES, SourceSpec
from mllm_assets.data.sharegpt.pictures import MediaFolders, Pictures
from mllm_assets.errors import SourceError
from mllm_assets.hub.client import cap_answers, find_sizes
from mllm_assets.hub.errors import HubRepo, explained, hub_token, scrubbed, with_retries


def stream_rows(source: SourceSpec, hub: HubRepo, commit: str, num_rows: int) -> Iterator[SourceRow]:
    """The first rows of a split.

    Raises:
        SourceError: The Hub refuses or cannot be reached, or `datasets` finds no such split; says what to do.
        DataError: No row has a column that the spec names.
    """
    cap_answers()
    stream = _opened(source, hub, commit)
    reader: RowReader | None = None
    for index, values in enumerate(_rows(hub, stream, num_rows)):
        if reader is None:
            features = stream.features or dict.fromkeys(values)
            named = {"image": None, **features} if source.image_column == "image" else features
            require_named(source, named, f"{source.repo} ({source.split})")
            reader = RowReader(source, _RepoFiles(hub, commit), _class_names(stream.features or {}))
        present = {name: value for name, value in values.items() if value is not None}
        yield from reader.read(present, SourceRow(row_index=index, location=f"{source.split}:row {index}"))


def _opened(source: SourceSpec, hub: HubRepo, commit: str) -> Any:
    from datasets import IterableDataset, load_dataset

    def load() -> Any:
        return load_dataset(
            source.repo, source.subset, split=source.split, revision=commit, streaming=True, token=hub_token()
        )

    found = _explained(hub, lambda: with_retries(load))
    assert isinstance(found, IterableDataset)
    return found.decode(False) if found.features else found


def _rows(hub: HubRepo, stream: Any, num_rows: int) -> Iterator[dict[str, Any]]:
    """The first rows; after a transient error the stream is opened again behind the last row that came."""
    num_read = 0
    rows: Iterator[dict[str, Any]] | None = None

    def read() -> list[dict[str, Any]]:
        nonlocal rows
        rows = rows if rows is not None else iter(stream.skip(num_read))
        try:
            return list(islice(rows, 1))
        except Exception:  # of whatever kind, and raised again: the stream is of no use any more
            rows = None
            raise

    while num_read < num_rows and (found := _explained(hub, lambda: with_retries(read))):
        num_read += 1
        yield found[0]


def _explained(hub: HubRepo, action: Callable[[], Any]) -> Any:
    """`datasets`' own errors as messages too: it raises many classes for data that it cannot read."""
    from datasets.exceptions import DatasetsError

    def act() -> Any:
        try:
            return action()
        except (DatasetsError, FileNotFoundError, ConnectionError, ValueError, LookupError, TypeError) as error:
            unreadable = " ".join(str(error).split())[:300] or type(error).__name__
        raise SourceError(
            f"{hub.repo} has no Parquet files, and cannot be read as a stream either ({scrubbed(unreadable)}). Correct "
            f"source.split and source.subset, or set source.revision to {CONVERTED!r} for the Hub's own Parquet "
            "conversion, or download the repository and use mllm-assets add-dataset on its folder."
        )

    return explained(hub, act)


class _RepoFiles(MediaFolders):
    """The pictures of a repository at one commit, by their address or by their path in it."""

    def __init__(self, hub: HubRepo, commit: str) -> None:
        super().__init__(())
        self._hub, self._commit = hub, commit

    def read_remote(self, address: str) -> Pictures:
        prefix = f"hf://datasets/{self._hub.repo}@{self._commit}/"
        return self.read(address.removeprefix(prefix)) if address.startswith(prefix) else super().read_remote(address)

    def read(self, name: str) -> Pictures:
        name = name.replace("\\", "/").removeprefix("./")
        try:
            [num_bytes] = find_sizes(self._hub, self._commit, [name]).values()
        except KeyError:
            return Pictures((None,), "image_missing", name)
        if num_bytes > MAX_IMAGE_BYTES:
            return Pictures((None,), "image_too_many_bytes", name)
        return Pictures((HubFile(self._hub, self._commit, name, num_bytes).read(),))


def _class_names(features: Any) -> dict[str, Sequence[str]]:
    return {name: feature.names for name, feature in features.items() if getattr(feature, "names", None)}
