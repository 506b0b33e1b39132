"""Pictures made in the test: coloured blocks, each seed unlike the others."""

import io
from typing import Any

import numpy as np
from PIL import Image

from mllm_assets.data.ingest.spec import DecodeLimits
from mllm_assets.data.quality.probes import ImageMeasurement, measure_image


def picture(seed: int, edge_px: int = 64) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((edge_px, edge_px), Image.Resampling.NEAREST)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def limits(**changes: Any) -> DecodeLimits:
    return DecodeLimits(
        **{"max_pixels": 10**8, "max_bytes": 10**8, "max_frames": 1000, "max_decode_s": 10.0, **changes}
    )


def measure(data: bytes | None, **changes: Any) -> ImageMeasurement:
    return measure_image(data, limits(**changes))
