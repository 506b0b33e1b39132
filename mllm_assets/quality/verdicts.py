"""Judge measurements: pure functions from numbers to reject reasons and flags."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllm_assets.data.conversation import conversation_defect
from mllm_assets.data.spec import DatasetSpec, QualitySpec
from mllm_assets.data.tokens import find_control_token, text_defect
from mllm_assets.quality.probes import ImageMeasurement


def image_reject_reason(image: ImageMeasurement, spec: QualitySpec) -> str | None:
    """Why an image cannot be used whatever it shows, or None; judged from measurements, nothing is decoded again."""
    if image.num_bytes > spec.max_image_bytes:
        return "image_too_many_bytes"
    if image.width_px is not None and image.height_px is not None:
        if image.width_px * image.height_px > spec.max_pixels:
            return "image_too_many_pixels"
        if min(image.width_px, image.height_px) < spec.min_edge_px:
            return "image_too_small"
    if image.num_frames is not None and image.num_frames > spec.max_frames:
        return "image_too_many_frames"
    return image.defect


def image_flags(image: ImageMeasurement, spec: QualitySpec) -> list[str]:
    """Which soft limits an image is beyond; formulas and limits are cleanvision's (see `QualitySpec`).

    Not "image_odd_size", which depends on the other images: see `odd_size_limits`.
    """
    if image.defect is not None:
        return []
    assert image.width_px and image.height_px
    assert image.brightness_p99 is not None and image.brightness_p5 is not None
    assert image.entropy_bits is not None
    assert image.blur_edge_std is not None and image.gray_histogram_std is not None
    gray_score = 1 - math.exp(-image.gray_histogram_std * 0.01)
    sharpness = 1 - math.exp(-image.blur_edge_std * 0.01) + (gray_score if gray_score > 0.18 else 0.0)
    aspect = min(image.width_px / image.height_px, image.height_px / image.width_px)
    beyond = {
        "image_dark": image.brightness_p99 < spec.max_dark_brightness,
        "image_light": 1 - image.brightness_p5 < spec.max_light_headroom,
        "image_low_information": image.entropy_bits * 0.1 < spec.max_low_information,
        "image_blurry": sharpness < spec.max_blurry,
        "image_odd_aspect_ratio": aspect < spec.max_odd_aspect_ratio,
        "image_grayscale": bool(image.is_grayscale),
    }
    return [flag for flag, is_beyond in beyond.items() if is_beyond]


def odd_size_limits(sizes: NDArray[np.float64], max_iqr: float) -> tuple[float, float]:
    """The smallest and largest edge (square root of the area, px) that is not odd among `sizes`; NaN counts as none.

    So many interquartile ranges beyond the quartiles; where half of all have one size, every other size is odd.
    """
    known = sizes[~np.isnan(sizes)]
    if not len(known):
        return 0.0, math.inf
    low, high = np.percentile(known, [25, 75])
    slack = max_iqr * (high - low)
    return float(low - slack), float(high + slack)


def text_reject_reason(caption: str | None, label: str | None, spec: DatasetSpec) -> str | None:
    """Why the texts that the answer uses cannot be used, or None."""
    if "{caption}" in spec.answer:
        if not (caption or "").strip():
            return "caption_empty"
        if len(caption or "") > spec.quality.max_caption_chars:
            return "caption_too_long"
        if defect := text_defect(caption or ""):
            return f"caption_{defect}"
    if "{label}" in spec.answer:
        if not (label or "").strip():
            return "label_missing"
        if defect := text_defect(label or ""):
            return f"label_{defect}"
    if find_control_token(render_answer(caption, label, spec)):
        return "caption_control_token"
    return None


def render_answer(caption: str | None, label: str | None, spec: DatasetSpec) -> str:
    """Fill the answer template; a brace in a caption is text, not a field."""
    parts = spec.answer.split("{caption}")
    shown_label = (label or "").replace("_", " ")
    return (caption or "").join(part.replace("{label}", shown_label) for part in parts)


def sample_reject_reason(
    image_reasons: Sequence[str | None], sample: Mapping[str, Any], spec: DatasetSpec
) -> str | None:
    """The first reason that rejects an ingested row: the source's own, its images' in order, its texts'."""
    if sample["source_defect"] is not None:
        return sample["source_defect"]
    if not image_reasons:
        return "image_missing"
    if (reason := next(filter(None, image_reasons), None)) is not None:
        return reason
    if sample["messages"] is not None:
        return conversation_defect(sample["messages"], len(image_reasons), spec.quality.max_caption_chars)
    return text_reject_reason(sample["caption"], sample["label"], spec)
