"""Whether a copy answers like its model."""

from typing import Any

import pytest

from mllm_assets.errors import RecipeError
from mllm_assets.evaluation.agreement import Agreement, AskedTwice, Comparison, Told


def told(text: str = "yes", **values: Any) -> Told:
    return Told(**{"text": text, "num_prompt_tokens": 3, "num_tokens": 2, "wall_s": 0.5, **values})


def compared(*pairs: tuple[Told, Told], **asked_for: Any) -> Comparison:
    rows = [AskedTwice(sample_id=str(i), prompt="?", own=own, copy=copy) for i, (own, copy) in enumerate(pairs)]
    return Comparison(rows=rows, asked_for=Agreement(**asked_for))


def test_a_copy_that_answers_the_same_passes_with_its_speeds() -> None:
    found = compared((told(), told(" yes\n", wall_s=0.25)))
    assert found.passed and found.facts()["tokens_per_s_of_copy"] == 8
    assert "loss_nats" not in found.facts() and "equal answers                1 of 1" in found.describe()


@pytest.mark.parametrize(
    ("copy", "said"),
    [
        ({"num_prompt_tokens": 4}, "compare its chat template, system text and image settings"),
        ({"prompt_ids": [1, 2, 4]}, "compare its chat template, system text and image settings"),
        ({"text": "no"}, "compare weights, image mean and precision"),
        ({"loss_nats": 1.5}, "compare weights, image mean and precision"),
    ],
)
def test_what_differs_fails_and_says_where_to_look(copy: dict[str, Any], said: str) -> None:
    """Prompts of the same length may have other tokens, and the same answers another loss."""
    found = compared((told(prompt_ids=[1, 2, 3], loss_nats=1.0), told(**copy)))
    assert not found.passed and said in found.describe()


def test_a_share_of_other_answers_and_a_small_distance_are_allowed() -> None:
    pairs = [(told(loss_nats=1.0), told("no" if not i else "yes", loss_nats=1.01)) for i in range(10)]
    assert compared(*pairs).passed
    assert not compared(*pairs, min_agreement=0.95).passed
    assert not compared(*pairs, max_loss_distance_nats=0.001).passed


@pytest.mark.parametrize("values", [{"max_samples": 0}, {"min_agreement": 1.1}, {"max_loss_distance_nats": -1.0}])
def test_what_cannot_be_asked_for_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(values))):
        Agreement(**values)
