"""The shipped datasets, as far as they go without a network: their rows and entries as golden files."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import mllm_assets
from mllm_assets.components import ImageTextDataset
from mllm_assets.data.dataset_info import register
from mllm_assets.data.sources import ingest
from mllm_assets.data.spec import DatasetSpec, SourceSpec, SplitSpec
from mllm_assets.data.splits import split
from mllm_assets.layout import Layout
from mllm_assets.quality.assess import assess

NAMES = ("emoji", "food101", "naruto", "pokemon")


@pytest.fixture(scope="module")
def shipped() -> dict[str, DatasetSpec]:
    tree = dg.ComponentTree.for_project(Path(mllm_assets.__file__).parent)
    return {component.spec().name: component.spec() for component in tree.get_all_components(of_type=ImageTextDataset)}


def test_the_datasets_of_the_guide_and_the_embedded_one_are_declared(
    shipped: dict[str, DatasetSpec], golden: Callable[[str, Any], None]
) -> None:
    assert sorted(shipped) == list(NAMES)
    facts = {
        name: {
            "repo": spec.source.repo,
            "path": spec.source.path,
            "prompts": list(spec.prompts),
            "answer": spec.answer,
            "entries": [spec.train_entry, spec.val_entry],
            "sizes": [spec.split.num_train, spec.split.num_val],
        }
        for name, spec in shipped.items()
    }
    golden("shipped_datasets", facts)


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_entries_are_the_golden_ones(
    name: str, shipped: dict[str, DatasetSpec], layout: Layout, golden: Callable[[str, Any], None]
) -> None:
    """The columns of the real repositories, on made pictures: what a row of each dataset looks like."""
    spec = shipped[name]
    if spec.source.kind == "huggingface":
        write_source(layout.root / "source.parquet", with_labels=spec.source.label_column is not None)
        stand_in = SourceSpec(
            kind="parquet",
            path="source.parquet",
            caption_column=spec.source.caption_column,
            label_column=spec.source.label_column,
        )
        spec = replace(spec, source=stand_in, split=SplitSpec(num_train=8, num_val=2))
    raw = ingest(spec, layout)
    quality = assess(spec, layout, raw.directory, "run")
    version = split(spec, layout, raw.directory, quality.directory, "run")
    info = register(spec, layout, version.directory)
    first_row = json.loads((version.directory / "train.json").read_text())[0]
    golden(f"dataset_{name}", {"dataset_info": info.entries, "first_row": first_row})


def write_source(path: Path, *, with_labels: bool) -> None:
    """Ten different pictures with the columns of the Hub's datasets: `text`, or a class `label` with its names."""
    pictures = []
    for index in range(10):
        buffer = io.BytesIO()
        image = Image.effect_mandelbrot((48, 48), (-2 + index / 7, -1, 1, 1 + index / 5), 60).convert("RGB")
        image.save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": f"{index}.png"})
    columns: dict[str, Any] = {"image": pictures}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if with_labels:
        columns["label"] = [index % 2 for index in range(10)]
        features["label"] = {"_type": "ClassLabel", "names": ["apple_pie", "baby_back_ribs"]}
    else:
        columns["text"] = [f"picture number {index}" for index in range(10)]
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
