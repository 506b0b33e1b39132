"""Judge measurements: pure functions from numbers to reject reasons and flags."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mllm_assets.artifacts import slug
from mllm_assets.data.ingest.flags import PROBES
from mllm_assets.data.ingest.source_rows import QUESTION
from mllm_assets.data.ingest.spec import DatasetSpec, QualitySpec
from mllm_assets.data.ingest.templates import names_in, render
from mllm_assets.data.quality.probes import ImageMeasurement
from mllm_assets.data.sharegpt.conversation import (
    IMAGE_PLACEHOLDER,
    conversation_defect,
    find_control_token,
    text_defect,
)

CORRECTED = "corrected_answer"  # of a row whose whole answer a person gave
COLUMN = "column"  # in a reason, where a column's name has no letter or digit of ASCII


def image_reject_reason(image: ImageMeasurement, spec: QualitySpec) -> str | None:
    """Why an image cannot be used, or None; judged from measurements alone."""
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
    """Which soft limits an image is beyond, in the order of `PROBES`.

    Not "image_odd_size", which depends on the other images: see `odd_size_limits`.
    """
    if image.defect is not None:
        return []
    return [name for name, probe in PROBES.items() if probe.score and probe.score(image) < probe.limit_of(spec)]


def odd_size_limits(sizes: NDArray[np.float64], max_iqr: float) -> tuple[float, float]:
    """The smallest and largest edge (square root of the area, px) that is not odd among `sizes`; NaN counts as none.

    `max_iqr` interquartile ranges beyond the quartiles; if half of all have one size, every other size is odd.
    """
    known = sizes[~np.isnan(sizes)]
    if not len(known):
        return 0.0, math.inf
    low, high = np.percentile(known, [25, 75])
    slack = max_iqr * (high - low)
    return float(low - slack), float(high + slack)


def text_reject_reason(sample: Mapping[str, Any], num_images: int, spec: DatasetSpec) -> str | None:
    """Why the texts that the question and the answer use cannot be used, or None."""
    texts = texts_of(sample)
    in_answer = names_in(spec.answer)
    for name in dict.fromkeys((*in_answer, *names_in(*spec.prompts))):
        text = texts.get(name) or ""
        if not text.strip() and (name in in_answer or name == QUESTION):
            return "label_missing" if name == "label" else f"{slug(name, COLUMN)}_empty"
        if name != "label" and len(text) > spec.quality.max_caption_chars:
            return f"{slug(name, COLUMN)}_too_long"
        if defect := text_defect(text if name in in_answer else text.replace(IMAGE_PLACEHOLDER, "")):
            return f"{slug(name, COLUMN)}_{defect}"
    if find_control_token(sample.get(CORRECTED) or render(spec.answer, texts)):
        return "caption_control_token"
    questions = [render(prompt, texts) for prompt in spec.prompts]
    if not all(question.strip() for question in questions):
        return "question_empty"
    if any(question.count(IMAGE_PLACEHOLDER) not in (0, num_images) for question in questions):
        return "question_placeholder_count"
    return None


def texts_of(sample: Mapping[str, Any]) -> dict[str, str | None]:
    """The texts of an ingested row, by the names that templates use; a label's "_" is shown as a space."""
    fields = json.loads(sample["fields"]) if sample.get("fields") else {}
    label = sample["label"]
    return {**fields, "caption": sample["caption"], "label": label and label.replace("_", " ")}


def render_answer(sample: Mapping[str, Any], spec: DatasetSpec) -> str:
    """The answer to a row's question; a brace in a caption is text, not a field."""
    return sample.get(CORRECTED) or render(spec.answer, texts_of(sample))


def sample_reject_reason(
    image_reasons: Sequence[str | None], sample: Mapping[str, Any], spec: DatasetSpec
) -> str | None:
    """The first reason that rejects an ingested row: the source's own, its images' in order, its texts'."""
    if sample["source_defect"] is not None:
        return sample["source_defect"]
    if not image_reasons and sample["messages"] is None and not _asks_itself(spec):
        return "image_missing"
    if (reason := next(filter(None, image_reasons), None)) is not None:
        return reason
    if sample["messages"] is not None:
        return conversation_defect(sample["messages"], len(image_reasons), spec.quality.max_caption_chars)
    return text_reject_reason(sample, len(image_reasons), spec)


def _asks_itself(spec: DatasetSpec) -> bool:
    """Whether each row has a question of its own, which it may ask without a picture."""
    return all(names_in(prompt) for prompt in spec.prompts)
