"""A source from its files to rows that a recipe can train on, with counts that add up."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mllm_assets.data.curate.checks import counts_add_up, every_image_has_a_placeholder
from mllm_assets.data.curate.splits import SplitResult
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.data.sharegpt.rows import Row
from mllm_assets.errors import MllmAssetsError
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import made_spec, png, run_line

ASK = ("What is this?",)


def through(spec: DatasetSpec, layout: Layout) -> tuple[SplitResult, list[Row]]:
    """The whole line; the rows are read back as training reads them."""
    *_, version = run_line(spec, layout)
    assert counts_add_up(version).passed
    assert every_image_has_a_placeholder(version.directory, layout.data).passed
    rows = Dataset(layout.data).entry("made_train").rows + Dataset(layout.data).entry("made_val").rows
    assert len(rows) == version.num_train + version.num_val
    return version, rows


def answers(rows: list[Row]) -> set[str]:
    return {row.messages[-1].content for row in rows}


def refused(spec: DatasetSpec, layout: Layout) -> str:
    with pytest.raises(MllmAssetsError) as caught:
        ingest(spec, layout)
    assert [path for path in layout.root.rglob("*") if ".tmp" in path.name] == []
    return str(caught.value)


def of_kind(kind: str, path: str | tuple[str, ...], num_train: int = 4, num_val: int = 2, **fields: Any) -> DatasetSpec:
    return made_spec(num_train, num_val, source=SourceSpec(kind=kind, path=path, **fields), prompts=ASK)


def picture_folder(layout: Layout, numbers: range = range(6)) -> Path:
    folder = layout.root / "pictures"
    folder.mkdir(exist_ok=True)
    for n in numbers:
        (folder / f"{n}.png").write_bytes(png(n))
    return folder


def rejects(layout: Layout) -> list[dict[str, Any]]:
    return QualityStore(layout.quality_db).query("SELECT source_location, reason FROM rejects ORDER BY rank")


def located(layout: Layout) -> list[dict[str, Any]]:
    return QualityStore(layout.quality_db).query("SELECT source_location FROM latest_verdicts ORDER BY row_index")


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
