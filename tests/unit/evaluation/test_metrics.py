"""Metrics per entry and model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mllm_assets.artifacts import find_damage
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.errors import DataError, IntegrityError, ModelError
from mllm_assets.evaluation import intervals
from mllm_assets.evaluation.intervals import SEED, gain_text, paired_gain
from mllm_assets.evaluation.metrics import (
    compute_metrics,
    gains_over_release,
    metric_rows,
    sample_metrics,
    write_metrics,
)
from mllm_assets.evaluation.scores import Answers, corpus_gain, corpus_score, definitions
from mllm_assets.evaluation.table import STORE_COLUMNS, predictions_digest, store_table, to_table
from tests.unit.evaluation.made_predictions import prediction, predictions

TRAIN = ["cat", "cat", "dog"]


def test_both_models_and_the_most_common_answer_are_scored() -> None:
    scored = compute_metrics(predictions(), TRAIN)["entries"]["pets_val"]
    models = scored["models"]
    assert scored["num_samples"] == 6
    assert scored["primary"] == "label_accuracy"
    assert models["tuned"]["label_accuracy"] == pytest.approx(5 / 6)
    assert models["base"]["label_accuracy"] == pytest.approx(1 / 6)
    assert models["most_common_answer"]["label_accuracy"] == pytest.approx(2 / 6)
    assert models["most_common_answer"].keys() & {"loss", "perplexity"} == set()


def test_loss_is_the_mean_over_tokens_not_over_samples() -> None:
    tuned = compute_metrics(predictions(), TRAIN)["entries"]["pets_val"]["models"]["tuned"]
    weights = range(2, 8)
    expected = sum(w * (1 + 0.01 * i) for i, w in enumerate(weights)) / sum(weights)
    assert tuned["loss"] == pytest.approx(expected)
    assert tuned["perplexity"] == pytest.approx(math.exp(expected))
    assert tuned["loss_shuffled"] > tuned["loss"] + 0.5


def test_gains_are_paired_and_positive_when_better() -> None:
    gains = compute_metrics(predictions(), TRAIN)["entries"]["pets_val"]["gains"]
    assert gains["tuned_over_base"]["loss"]["mean"] == pytest.approx(2.0)
    assert gains["tuned_over_base"]["loss"]["low"] == pytest.approx(2.0)
    assert gains["tuned_over_most_common_answer"]["label_accuracy"]["mean"] == pytest.approx(0.5)
    assert gains["tuned_over_shuffled_images"]["loss"]["mean"] == pytest.approx(0.525)
    assert gains["tuned_over_shuffled_images"]["loss"]["num_pairs"] == 6


def test_a_gains_interval_holds_its_mean_and_narrows_with_more_samples() -> None:
    noise = np.random.default_rng(0).normal(0.3, 1.0, size=400)
    few, many = paired_gain(noise[:40]), paired_gain(noise)
    for gain, values in ((few, noise[:40]), (many, noise)):
        assert gain["low"] < gain["mean"] < gain["high"] and gain["num_pairs"] == len(values)
        expected = 1.96 * values.std(ddof=1) / len(values) ** 0.5
        assert (gain["high"] - gain["low"]) / 2 == pytest.approx(expected, rel=0.1), "as the normal approximation"
    assert paired_gain(noise) == many, "the same differences give the same interval"
    assert paired_gain(noise[:1])["low"] is None


def test_bleu_and_chrf_gains_carry_the_p_value_of_a_paired_test() -> None:
    gains = compute_metrics(predictions(), TRAIN)["entries"]["pets_val"]["gains"]["tuned_over_base"]
    models = compute_metrics(predictions(), TRAIN)["entries"]["pets_val"]["models"]
    for metric in ("bleu", "chrf"):
        assert gains[metric]["mean"] == pytest.approx(models["tuned"][metric] - models["base"][metric])
        assert 0 < gains[metric]["p_value"] < 0.05
        assert 0 < gains[metric]["low"] < gains[metric]["mean"] < gains[metric]["high"]


def test_bleu_and_chrf_have_intervals_against_the_release_too() -> None:
    gains = gains_over_release(predictions(), predictions())["pets_val"]
    for metric in ("bleu", "chrf"):
        assert (gains[metric]["mean"], gains[metric]["low"], gains[metric]["high"]) == (0, 0, 0)
    assert gain_text(gains["bleu"]).startswith("+0 (0 to 0, p = ")
    assert "paired bootstrap over samples, 95% percentile interval" in definitions()["gain"]


def test_the_interval_of_a_corpus_metric_is_that_of_the_corpus_scores_of_resamples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Written out with sacrebleu's public functions: each resample is scored as a corpus of its own."""
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 100)
    words = "a red bird sits on the branch of an old tree and sings".split()
    rng = np.random.default_rng(0)
    references = [" ".join(rng.choice(words, 8)) for _ in range(12)]
    answers = [" ".join(r.split()[:6]) for r in references]
    others = [" ".join(r.split()[2:5]) for r in references]
    rng, differences = np.random.default_rng(SEED), []
    for _ in range(100):
        rows = rng.integers(0, 12, 12)
        pick = [[texts[row] for row in rows] for texts in (answers, others, references)]
        differences.append(corpus_score("bleu", pick[0], pick[2]) - corpus_score("bleu", pick[1], pick[2]))
    gain = corpus_gain("bleu", *(Answers(answers=said, references=references) for said in (answers, others)))
    assert [gain["low"], gain["high"]] == pytest.approx(list(np.percentile(differences, [2.5, 97.5])), rel=1e-6)


def test_captions_get_cider_d_and_three_rouges() -> None:
    caption = {"reference": "a small red bird sits on a branch", "label": None}
    rows = [
        prediction("tuned", 0, **caption, answer="a small red bird"),
        prediction("tuned", 1, answer="dog", label=None),
    ]
    tuned = compute_metrics(to_table(rows), TRAIN)["entries"]["pets_val"]["models"]["tuned"]
    assert tuned["rouge_1"] > tuned["rouge_2"] > 0 and tuned["cider_d"] > 0
    perfect = [row | {"answer": row["reference"]} for row in rows]
    best = compute_metrics(to_table(perfect), TRAIN)["entries"]["pets_val"]["models"]["tuned"]
    assert best["cider_d"] > tuned["cider_d"] and best["rouge_2"] > tuned["rouge_2"]


def test_confusion_counts_every_sample_once() -> None:
    table = compute_metrics(predictions(), TRAIN)["entries"]["pets_val"]["confusion"]["tuned"]
    assert table["named"] == [*table["labels"], "(none)", "(several)"]
    assert sum(map(sum, table["counts"])) == 6
    assert table["counts"][table["labels"].index("horse")][table["named"].index("(none)")] == 1


def test_captions_without_labels_are_judged_by_rouge_l() -> None:
    scored = compute_metrics(predictions(label=None), TRAIN)["entries"]["pets_val"]
    assert scored["primary"] == "rouge_l"
    assert "label_accuracy" not in scored["models"]["tuned"] and "confusion" not in scored


def test_samples_without_images_have_no_shuffled_loss() -> None:
    scored = compute_metrics(predictions(loss_shuffled_nats=None), TRAIN)["entries"]["pets_val"]
    assert "loss_shuffled" not in scored["models"]["tuned"]
    assert scored["gains"]["tuned_over_shuffled_images"] == {}


def test_a_tie_for_the_most_common_answer_is_broken_by_name() -> None:
    assert compute_metrics(predictions(), ["b", "a"])["entries"]["pets_val"]["most_common_answer"] == "a"


def test_models_that_were_asked_different_samples_are_refused() -> None:
    rows = [prediction("base", 0), prediction("tuned", 0), prediction("tuned", 1)]
    with pytest.raises(IntegrityError, match=r"different samples of pets_val \(base 1, tuned 2\). Materialise"):
        compute_metrics(to_table(rows), TRAIN)


def test_a_loss_that_is_not_finite_names_model_and_sample() -> None:
    rows = [prediction("base", 0), prediction("tuned", 0, loss_nats=math.nan)]
    with pytest.raises(ModelError, match="The tuned model's loss on sample sample-0 of pets_val is not a finite"):
        compute_metrics(to_table(rows), TRAIN)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(DataError, match="no predictions to score. Check that the evaluation entries have rows"):
        compute_metrics(to_table([]), TRAIN)
    with pytest.raises(DataError, match="no training answers to compare with"):
        compute_metrics(predictions(), [])


def test_the_digest_covers_what_was_said_but_not_how_long_it_took() -> None:
    assert predictions_digest(predictions()) == predictions_digest(predictions(latency_s=9.0))
    assert predictions_digest(predictions()) != predictions_digest(predictions(answer="x"))


def test_rows_for_the_store_carry_run_recipe_and_checkpoint() -> None:
    names = {"run_id": "r1", "recipe": "pets", "checkpoint_digest": "abc"}
    rows = metric_rows(compute_metrics(predictions(), TRAIN), **names).to_pylist()
    assert {row["model"] for row in rows} == {"base", "tuned", "most_common_answer"}
    assert rows[0] | names == rows[0]
    said = predictions()
    assert store_table(said, sample_metrics(said), **names).column_names == [
        "run_id", "recipe", "checkpoint_digest", *STORE_COLUMNS, "metrics"
    ]  # fmt: skip


def test_the_store_takes_predictions_and_metrics(tmp_path: Path) -> None:
    names = {"run_id": "r1", "recipe": "pets", "checkpoint_digest": "abc"}
    store = QualityStore(tmp_path / "quality.duckdb")
    metrics = metric_rows(compute_metrics(predictions(), TRAIN), **names)
    said = predictions()
    store.write({"predictions": store_table(said, sample_metrics(said), **names), "eval_metrics": metrics})
    (row,) = store.query("SELECT count(*) AS n, max(loss_nats) AS worst FROM predictions WHERE model = 'tuned'", [])
    assert row["n"] == 6 and row["worst"] == pytest.approx(1.05)
    (row,) = store.query(
        "SELECT value FROM eval_metrics WHERE model = 'most_common_answer' AND metric = 'exact_match'", []
    )
    assert row["value"] == pytest.approx(2 / 6)
    sums = store.query(
        "SELECT sum((metrics->>'label_accuracy')::DOUBLE) AS right, any_value(label) AS label FROM predictions "
        "WHERE model = 'tuned' AND (metrics->>'exact_match')::DOUBLE = 1"
    )
    assert sums == [{"right": 5.0, "label": "cat"}]


def test_the_mean_of_the_samples_metrics_is_the_metric() -> None:
    table = predictions()
    scored = compute_metrics(table, TRAIN)["entries"]["pets_val"]["models"]["tuned"]
    rows = [row for row, said in zip(sample_metrics(table), table.to_pylist(), strict=True) if said["model"] == "tuned"]
    assert {name: pytest.approx(sum(row[name] for row in rows) / 6) for name in rows[0]} == {
        name: scored[name] for name in rows[0]
    }


def test_written_metrics_are_json_and_complete(tmp_path: Path) -> None:
    metrics = compute_metrics(predictions(), TRAIN)
    manifest = write_metrics(tmp_path / "m", metrics, {"predictions_digest": "abc"})
    assert json.loads((tmp_path / "m" / "eval_metrics.json").read_text()) == metrics
    assert manifest["inputs"] == {"predictions_digest": "abc"}
    assert find_damage(tmp_path / "m") is None
    assert write_metrics(tmp_path / "again", metrics, {})["digest"] == manifest["digest"]
