"""A finished run serves a sweep by answers only if it was asked the same."""

from typing import Any

import pytest

from mllm_assets.components.assets.sweep import answered
from mllm_assets.worker.run_settings import AnswerSample

ASKED = {"metrics": ["label_accuracy", "anls"], "max_samples": 64, "max_new_tokens": 64}


@pytest.mark.parametrize(
    ("metrics", "asked", "is_answered"),
    [
        ((), None, True),
        (("anls",), None, False),
        (("anls",), ASKED, True),
        (("anls", "rouge_l"), ASKED, False),
        (("anls",), {**ASKED, "max_samples": 8}, False),
    ],
)
def test_a_finished_run_was_asked_the_same_or_is_trained_again(
    metrics: tuple[str, ...], asked: dict[str, Any] | None, is_answered: bool
) -> None:
    manifest = {"eval_loss": 1.0, **({"asked": asked} if asked else {})}
    assert answered(manifest, AnswerSample(metrics=metrics)) is is_answered
