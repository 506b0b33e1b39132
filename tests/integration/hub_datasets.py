"""A dataset on a stand-in Hub, and how tests ingest it."""

import io
import json
import os
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mllm_assets.data.ingest.raw_files import read_raw
from mllm_assets.data.ingest.sources import RawDataset, ingest
from mllm_assets.data.ingest.spec import DatasetSpec, SourceSpec
from mllm_assets.data.ingest.split_spec import SplitSpec
from mllm_assets.errors import SourceError
from mllm_assets.layout import Layout
from tests.integration.stand_in_hub import SIGNATURE, StandInHub


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet_file(first: int, count: int, *, group_rows: int = 10, num_bytes: int | None = None) -> bytes:
    """Rows `first` and on: a picture, or so many random bytes, with its number as text and its parity as class."""
    features = {"image": {"_type": "Image"}, "label": {"names": ["even", "odd"], "_type": "ClassLabel"}}
    features["text"] = {"dtype": "string", "_type": "Value"}
    numbers = range(first, first + count)
    images = [
        {"bytes": png(number) if num_bytes is None else os.urandom(num_bytes), "path": None} for number in numbers
    ]
    columns = {"image": images, "text": [f"picture {number}" for number in numbers], "label": [n % 2 for n in numbers]}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    buffer = io.BytesIO()
    # pages of few rows, and no picture in the footer, as the Hub's files of pictures have it
    pq.write_table(table, buffer, row_group_size=group_rows, write_batch_size=16, write_statistics=False)
    return buffer.getvalue()


FILES_READ = r"GET /datasets/\S+/resolve/\S+\.parquet"
FILES = {
    "README.md": b"made",
    "data/train-00000-of-00002.parquet": parquet_file(0, 100),
    "data/train-00001-of-00002.parquet": parquet_file(100, 60),
    "data/validation-00000-of-00001.parquet": parquet_file(500, 10),
}


def hub_spec(num_train: int = 20, num_val: int = 5, **source: Any) -> DatasetSpec:
    return DatasetSpec(
        name="made",
        source=SourceSpec(kind="huggingface", **{"repo": "made/set", "label_column": "label", **source}),
        prompts=("What?",),
        split=SplitSpec(num_train=num_train, num_val=num_val, num_test=0),
    )


def ingested(hub: StandInHub, root: Path, spec: DatasetSpec | None = None) -> tuple[RawDataset, list[dict[str, Any]]]:
    raw = ingest(spec or hub_spec(), Layout(root), hub_endpoint=hub.endpoint)
    return raw, list(read_raw(raw.directory))


def failing(hub: StandInHub, root: Path, **source: Any) -> str:
    with pytest.raises(SourceError) as caught:
        ingested(hub, root, hub_spec(**source))
    shown = "".join(traceback.format_exception(caught.value))
    assert SIGNATURE not in shown and os.environ.get("HF_TOKEN", SIGNATURE) not in shown
    assert [path for path in root.rglob("*") if path.is_file()] == []
    return str(caught.value)
