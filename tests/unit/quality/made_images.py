"""Pictures made in the test: coloured blocks, each seed unlike the others."""

import io
from typing import Any

import numpy as np
from PIL import Image

from mllm_assets.quality.probes import ImageMeasurement, measure_image


def picture(seed: int, edge_px: int = 64) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((edge_px, edge_px), Image.Resampling.NEAREST)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def measure(data: bytes | None, max_pixels: int = 10**8, max_bytes: int = 10**8) -> ImageMeasurement:
    return measure_image(data, max_pixels=max_pixels, max_bytes=max_bytes)
