"""The shipped datasets, as far as they go without a network: their rows and entries as golden files."""

import io
import json
import shutil
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
from mllm_assets.data.curate.checks import splits_share_no_image
from mllm_assets.data.curate.register import register
from mllm_assets.data.ingest.sources import ingest
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.ingest.split_spec import SplitSpec
from mllm_assets.data.quality.assess import assess
from mllm_assets.layout import Layout
from tests.unit.data.made_datasets import run_line

pytestmark = pytest.mark.not_fast

NAMES = ("emoji", "food101", "naruto", "pokemon")


@pytest.fixture(scope="module")
def shipped() -> dict[str, DatasetSpec]:
    tree = dg.ComponentTree.for_project(Path(mllm_assets.__file__).parent)
    return {component.spec().name: component.spec() for component in tree.get_all_components(of_type=ImageTextDataset)}


@pytest.fixture(scope="module")
def measured(shipped: dict[str, DatasetSpec], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root where the 800 emoji were decoded and measured, which is what takes seconds."""
    layout = Layout(tmp_path_factory.mktemp("emoji"))
    assess(shipped["emoji"], layout, ingest(shipped["emoji"], layout).directory, "measured")
    return layout.root


def test_the_demo_line_gives_560_and_twice_120_of_800(
    shipped: dict[str, DatasetSpec], measured: Path, layout: Layout, golden: Callable[[str, Any], None]
) -> None:
    """The golden holds digests too: the same inputs give the same data versions on every machine."""
    shutil.copytree(measured, layout.root, symlinks=True, dirs_exist_ok=True)
    spec = replace(shipped["emoji"], prompts=("What kind of emoji is this?",))
    raw, quality, version = run_line(spec, layout)
    train = json.loads((version.directory / "train.json").read_text())
    golden(
        "emoji_data",
        {
            "raw_digest": raw.digest,
            "num_raw": version.num_raw,
            "num_train": version.num_train,
            "num_val": version.num_val,
            "num_test": version.num_test,
            "num_unused": version.num_unused,
            "num_rejected": version.num_rejected,
            "num_duplicates": quality.num_duplicates,
            "flags": quality.flags,
            "split_digest": version.digest,
            "first_row": train[0],
            "dataset_info": json.loads(layout.dataset_info.read_text()),
        },
    )
    assert splits_share_no_image(version.directory, layout.data).passed


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
            "entries": list(spec.entries.values()),
            "sizes": [spec.split.num_train, spec.split.num_val, spec.split.num_test],
        }
        for name, spec in shipped.items()
    }
    golden("shipped_datasets", facts)


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_entries_are_the_golden_ones(
    name: str, shipped: dict[str, DatasetSpec], measured: Path, layout: Layout, golden: Callable[[str, Any], None]
) -> None:
    """The columns of the real repositories, on made pictures: what a row of each dataset looks like."""
    spec = shipped[name]
    if name == "emoji":
        shutil.copytree(measured, layout.root, symlinks=True, dirs_exist_ok=True)
    if spec.source.kind == "huggingface":
        write_source(layout.root / "source.parquet", with_labels=spec.source.label_column is not None)
        stand_in = SourceSpec(
            kind="parquet",
            path="source.parquet",
            caption_column=spec.source.caption_column,
            label_column=spec.source.label_column,
        )
        spec = replace(spec, source=stand_in, split=SplitSpec(num_train=8, num_val=2))
    version = run_line(spec, layout)[2]
    entries = register(spec, layout, version.directory).entries
    first_row = json.loads((version.directory / "train.json").read_text())[0]
    golden(f"dataset_{name}", {"dataset_info": entries, "first_row": first_row})


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
