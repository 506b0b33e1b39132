"""The kinds of source that a dataset may come from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets import plugins


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceKind:
    """One kind of source.

    Attributes:
        name: `source.kind` in a dataset's YAML.
        description: What it is.
        read: Yields `SourceRow`s, given a `SourceSpec` and the project's root; a function or its `module:name`. None
            for the Hub, which is read at a commit.
        has_sides: It may be split already, so that `val_split` names its validation part.
        reads_sides: Its function yields the sides by itself; of other kinds, files are sorted by their names.
        holds_conversations: Its rows are conversations.
        is_folder: `path` is one folder, all of whose files belong to it.
    """

    name: str
    description: str
    read: str | Callable[[Any, Path], Iterator[Any]] | None
    has_sides: bool = False
    reads_sides: bool = False
    holds_conversations: bool = False
    is_folder: bool = False


KINDS: dict[str, SourceKind] = {}
_INGEST = "mllm_assets.data.ingest"


def register(kind: SourceKind) -> SourceKind:
    """Add a kind of source, which a dataset's YAML can then name.

    Raises:
        RecipeError: Another has its name.
    """
    plugins.add(KINDS, kind.name, kind, "kind of source")
    return kind


for _entry in (
    SourceKind(name="huggingface", description="A Hugging Face Hub dataset.", read=None),
    SourceKind(
        name="table",
        description="Files of rows: JSON, JSON lines, CSV, TSV, Parquet, Arrow, told by content.",
        read=f"{_INGEST}.tables:read_tables",
        has_sides=True,
    ),
    SourceKind(name="parquet", description="The same, as table.", read=f"{_INGEST}.tables:read_tables", has_sides=True),
    SourceKind(name="arrow", description="The same, as table.", read=f"{_INGEST}.tables:read_tables", has_sides=True),
    SourceKind(
        name="coco",
        description="COCO captions, VQA: annotations that are joined with images and questions by their ids.",
        read=f"{_INGEST}.coco:read_coco",
        has_sides=True,
    ),
    SourceKind(
        name="image_folder",
        description="A folder of images with metadata.jsonl or captions in text files.",
        read=f"{_INGEST}.image_folder:read_image_folder",
        has_sides=True,
        reads_sides=True,
        is_folder=True,
    ),
    SourceKind(
        name="webdataset",
        description="WebDataset tar files.",
        read=f"{_INGEST}.webdataset:read_webdataset",
        has_sides=True,
    ),
    SourceKind(
        name="llamafactory",
        description="A LLaMA-Factory folder with dataset_info.json.",
        read=f"{_INGEST}.llamafactory:read_llamafactory",
        has_sides=True,
        reads_sides=True,
        holds_conversations=True,
        is_folder=True,
    ),
):
    register(_entry)
