"""Verdicts are pure: numbers in, reasons out."""

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_assets.data.ingest.spec import DatasetSpec, QualitySpec, SourceSpec
from mllm_assets.data.quality.verdicts import (
    image_flags,
    image_reject_reason,
    odd_size_limits,
    render_answer,
    sample_reject_reason,
)
from tests.unit.data.quality.made_images import encode, measure, picture


def spec(answer: str = "{caption}", **quality: Any) -> DatasetSpec:
    source = SourceSpec(kind="parquet", path="a.parquet", label_column="label")
    return DatasetSpec(name="made", source=source, prompts=("What?",), answer=answer, quality=QualitySpec(**quality))


GOOD = measure(encode(picture(1)))


def sample(caption: str | None, label: str | None = None) -> dict[str, str | None]:
    return {"caption": caption, "label": label, "messages": None, "source_defect": None}


@pytest.mark.parametrize(
    ("caption", "label", "answer", "reason"),
    [
        ("a heart", None, "{caption}", None),
        (None, None, "{caption}", "caption_empty"),
        (" \n", None, "{caption}", "caption_empty"),
        (None, "heart", "{label}", None),
        ("a heart", None, "{label}", "label_missing"),
        ("x" * 8193, None, "{caption}", "caption_too_long"),
        ("an <image> here", None, "{caption}", "caption_control_token"),
        ("stop<end_of_turn>", None, "{caption}", "caption_control_token"),
        ("an <unused12> here", None, "{caption}", "caption_control_token"),
        ("x", "<bos>", "{label}", "label_control_token"),
        ("image>", "x", "<{caption}", "caption_control_token"),
        ("<b>bold</b>", None, "{caption}", None),
        ("x" * 100_000, None, "{caption}", "caption_too_long"),
        ("red\x1b[2J", None, "{caption}", "caption_control_character"),
        ("a\x00b", None, "{caption}", "caption_control_character"),
        ("a tab\tand\r\nlines", None, "{caption}", None),
        ("לב אדום \u200f♥", None, "{caption}", None),
        ("a red \ufffd", None, "{caption}", "caption_undecodable"),
        ("a red \ud83d", None, "{caption}", "caption_undecodable"),
        (None, "red\x07", "{label}", "label_control_character"),
    ],
)
def test_texts_are_judged_by_what_the_answer_uses(
    caption: str | None, label: str | None, answer: str, reason: str | None
) -> None:
    """A control token in a caption would be read as control by the tokenizer."""
    assert sample_reject_reason([None], sample(caption, label), spec(answer)) == reason


def test_limits_are_judged_without_decoding_again() -> None:
    assert image_reject_reason(GOOD, QualitySpec()) is None
    assert image_reject_reason(GOOD, QualitySpec(min_edge_px=65)) == "image_too_small"
    assert image_reject_reason(GOOD, QualitySpec(max_pixels=4000)) == "image_too_many_pixels"
    assert image_reject_reason(GOOD, QualitySpec(max_image_bytes=10)) == "image_too_many_bytes"


def test_a_sample_without_images_is_rejected() -> None:
    assert sample_reject_reason([], sample("x"), spec()) == "image_missing"


@pytest.mark.parametrize(
    ("image", "flags"),
    [
        (Image.new("RGB", (64, 64), "black"), {"image_dark", "image_low_information"}),
        (Image.new("RGB", (64, 64), "white"), {"image_light", "image_low_information"}),
        (picture(1).resize((640, 64)), {"image_odd_aspect_ratio"}),
        (picture(1), set()),
    ],
    ids=["black", "white", "strip", "picture"],
)
def test_flags_mark_what_lies_beyond_a_soft_limit(image: Image.Image, flags: set[str]) -> None:
    measured = measure(encode(image))
    assert flags <= set(image_flags(measured, QualitySpec()))
    assert image_reject_reason(measured, QualitySpec()) is None


def test_a_label_is_shown_without_underscores() -> None:
    assert (
        render_answer({"caption": None, "label": "apple_pie"}, spec("This image shows {label}."))
        == "This image shows apple pie."
    )


def test_an_odd_size_is_judged_against_the_others() -> None:
    low, high = odd_size_limits(np.array([60.0, 64.0, 64.0, 70.0, np.nan, 400.0]), 3.0)
    assert 30 < low < 60 and 70 < high < 400
    assert odd_size_limits(np.array([64.0] * 5 + [65.0]), 3.0) == (64.0, 64.0)
    assert odd_size_limits(np.array([np.nan]), 3.0) == (0.0, math.inf)
