"""Metrics for short texts, JSON objects and boxes."""

import json

import numpy as np
import pytest

from mllm_assets.evaluation.intervals import paired_gain
from mllm_assets.evaluation.metrics import compute_metrics, pictures_of
from mllm_assets.evaluation.scores import Answers
from mllm_assets.evaluation.structured_scores import anls, box_iou, boxes_in, character_error_rate, json_object
from mllm_assets.evaluation.table import to_table
from tests.unit.evaluation.made_predictions import prediction


def test_anls_forgives_a_typing_mistake_and_nothing_more() -> None:
    assert anls(" Invoice 17 ", "invoice 17") == 1.0
    assert anls("invoice 71", "invoice 17") == pytest.approx(0.8)
    assert anls("none", "invoice 17") == 0.0
    assert character_error_rate("abcx", "abc") == pytest.approx(1 / 3)
    assert character_error_rate("", "abc") == 1.0


def scores(name: str, answers: list[str], references: list[str], labels: list[str] | None = None) -> list[float] | None:
    found = Answers(answers=answers, references=references, labels=labels).samples.get(name)
    return None if found is None else found.tolist()


def test_json_is_compared_by_field_whatever_its_layout() -> None:
    right = json.dumps({"total": 12.0, "items": [{"name": "tea"}, {"name": "milk"}]})
    same = '```json\n{"items": [{"name": "milk"}, {"name": "tea"}],\n "total": 12}\n```'
    half = '{"total": 13, "items": [{"name": "tea"}, {"name": "milk"}, {"name": "pie"}]}'
    assert scores("json_field_f1", [same, half, "no JSON"], [right] * 3) == [1.0, pytest.approx(4 / 7), 0.0]
    assert scores("json_valid", [same, '{"total": "12", "items": []}', "[1]"], [right] * 3) == [1.0, 0.0, 0.0]
    assert scores("json_valid", [same], ["a plain caption"]) is None, "only where every reference is JSON"
    assert json_object("[" * 100_000) is None


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ('[{"bbox_2d": [10, 20, 30, 40], "label": "cat"}, {"bbox_2d": [1,2,3,4]}]', [(10, 20, 30, 40), (1, 2, 3, 4)]),
        ("<|box_start|>(10,20),(30,40)<|box_end|>", [(10, 20, 30, 40)]),
        ("<loc0020><loc0010><loc0040><loc0030> cat", [(10, 20, 30, 40)]),
        ("[0.5, 0.25, 0.1, 0.75]", [(0.1, 0.25, 0.5, 0.75)]),
        ("a cat, 3 years old", []),
    ],
)
def test_boxes_are_found_as_models_write_them(text: str, boxes: list[tuple[float, ...]]) -> None:
    assert boxes_in(text) == boxes


def test_missing_and_surplus_boxes_count_nothing() -> None:
    assert box_iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    right = "[0, 0, 10, 10] and [20, 20, 30, 30]"
    answers = ["[20, 20, 30, 30], [0, 0, 10, 10]", "[0, 0, 10, 10]", "[0, 0, 10, 10] [20, 20, 30, 30] [1, 1, 2, 2]", ""]
    assert scores("box_iou", answers, [right] * 4) == [1.0, 0.5, pytest.approx(2 / 3), 0.0]
    assert scores("box_iou", ["[0, 0, 1, 1]"], ["a cat"]) is None


def test_labelled_samples_are_not_transcribed() -> None:
    assert scores("anls", ["cat"], ["cat"], labels=["cat"]) is None
    assert scores("anls", ["cat"], ["cat"]) == [1.0]


def test_questions_about_one_picture_are_drawn_together() -> None:
    """40 questions about 4 pictures say little more than 4 samples; taken as 40, the interval is far too narrow."""
    gains = np.repeat([1.0, 0.0, 1.0, -0.5], 10)
    pictures = np.repeat(np.arange(4), 10)
    alone, together = paired_gain(gains), paired_gain(gains, pictures)
    assert alone["mean"] == together["mean"] and together["num_pairs"] == 40
    assert together["high"] - together["low"] > 2 * (alone["high"] - alone["low"])
    assert paired_gain(gains[:10], pictures[:10])["low"] is None, "one picture says nothing of its noise"


def test_the_pictures_of_predictions_reach_every_interval() -> None:
    def gains(*, is_shared: bool) -> dict[str, float]:
        rows = [
            prediction(model, index, images=[f"images/{index // 2 if is_shared else index}.png"])
            for model in ("base", "tuned")
            for index in range(6)
        ]
        [scored] = compute_metrics(to_table(rows), ["cat"])["entries"].values()
        found = scored["gains"]
        pairs = {"loss": found["tuned_over_shuffled_images"]["loss"], "bleu": found["tuned_over_base"]["bleu"]}
        return {name: gain["low"] for name, gain in (pairs | found["tuned_over_base"]).items()}

    shared, alone = gains(is_shared=True), gains(is_shared=False)
    assert shared["bleu"] != alone["bleu"] and shared["label_accuracy"] != alone["label_accuracy"]
    assert pictures_of([{"images": [], "sample_id": "a"}, {"images": [], "sample_id": "b"}]) is None
