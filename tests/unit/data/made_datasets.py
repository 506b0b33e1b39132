"""Small datasets made in the test: pictures of coloured blocks, each seed a picture unlike the others."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mllm_assets.data.curate.register import register
from mllm_assets.data.curate.splits import SplitResult, split
from mllm_assets.data.ingest.sources import RawDataset, ingest
from mllm_assets.data.ingest.spec import DatasetSpec, QualitySpec, SourceSpec
from mllm_assets.data.ingest.split_spec import SplitSpec
from mllm_assets.data.quality.assess import QualityResult, assess
from mllm_assets.layout import Layout


def picture(seed: int, edge_px: int = 64, mode: str = "RGB") -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((edge_px, edge_px), Image.Resampling.NEAREST).convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int, edge_px: int = 64) -> bytes:
    return encode(picture(seed, edge_px))


def write_source(root: Path, rows: Sequence[tuple[bytes | None, str | None]], name: str = "source.parquet") -> str:
    """A Parquet file of (image, text) rows; returns its path as a spec has it."""
    table = pa.table(
        {"image": pa.array([r[0] for r in rows], pa.binary()), "text": pa.array([r[1] for r in rows], pa.string())}
    )
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, root / name)
    return name


def made_spec(
    num_train: int = 8, num_val: int = 2, *, quality: QualitySpec | None = None, **fields: Any
) -> DatasetSpec:
    source = fields.pop("source", None) or SourceSpec(kind="parquet", path="source.parquet")
    return DatasetSpec(
        name=fields.pop("name", "made"),
        source=source,
        prompts=fields.pop("prompts", ("What is this?", "Describe it.")),
        split=SplitSpec(
            num_train=num_train,
            num_val=num_val,
            num_test=fields.pop("num_test", None),
            seed=fields.pop("seed", 42),
            strategy=fields.pop("strategy", "grouped"),
        ),
        quality=quality or QualitySpec(),
        **fields,
    )


def run_line(spec: DatasetSpec, layout: Layout, run_id: str = "run-1") -> tuple[RawDataset, QualityResult, SplitResult]:
    """Ingest, assess, split and register."""
    raw = ingest(spec, layout)
    quality = assess(spec, layout, raw.directory, run_id)
    version = split(spec, layout, raw.directory, quality.directory, run_id)
    register(spec, layout, version.directory)
    return raw, quality, version
