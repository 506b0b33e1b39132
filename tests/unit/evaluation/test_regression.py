"""A released model that does worse on new samples is found, and noise is not taken for it."""

import numpy as np
import pyarrow as pa

from mllm_assets.evaluation.gates import compare_to_release_time
from mllm_assets.evaluation.intervals import unpaired_rise


def predictions(losses: np.ndarray, entry: str = "val") -> pa.Table:
    common = {"model": "tuned", "entry": entry}
    rows = [{**common, "row_index": index, "loss_nats": float(loss)} for index, loss in enumerate(losses)]
    return pa.Table.from_pylist([*rows, {**common, "model": "base", "row_index": 0, "loss_nats": 99.0}])


def draw(seed: int, mean: float, num: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 0.3, num)


def test_a_rise_above_the_noise_is_a_regression_and_one_within_it_is_not() -> None:
    judged = predictions(draw(1, 1.0))
    found = compare_to_release_time(judged, predictions(draw(2, 1.5)), max_rise_nats=0.05)
    assert found.regressed
    assert found.description.startswith("val: the loss rose by 0.")
    assert "60 samples at the release, 60 now" in found.description
    assert not compare_to_release_time(judged, predictions(draw(3, 1.05)), max_rise_nats=0.05).regressed
    assert not compare_to_release_time(judged, predictions(draw(4, 0.5)), max_rise_nats=0.05).regressed, "it got better"


def test_the_worst_entry_counts_and_entries_that_cannot_be_compared_do_not() -> None:
    judged = pa.concat_tables([predictions(draw(1, 1.0)), predictions(draw(2, 1.0), "other")])
    newest = pa.concat_tables([predictions(draw(3, 1.0)), predictions(draw(4, 2.0), "other")])
    assert compare_to_release_time(judged, newest, max_rise_nats=0.05).description.startswith("other: ")
    nothing = compare_to_release_time(judged, predictions(draw(1, 9.0), "new"), max_rise_nats=0.05)
    assert not nothing.regressed and nothing.description.startswith("No entry of the newest evaluation")
    assert not compare_to_release_time(judged, predictions(draw(1, 9.0, 1)), max_rise_nats=0.05).regressed


def test_the_interval_holds_the_true_rise_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(100):
        rise = unpaired_rise(draw(2 * seed, 1.0, 40), draw(2 * seed + 1, 1.2, 40))
        held += rise["low"] <= 0.2 <= rise["high"]
    assert 88 <= held <= 100
