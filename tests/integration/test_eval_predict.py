"""Predictions, metrics and gates on a tiny Gemma 3 with random weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_assets import sample_data
from mllm_assets.artifacts import find_damage, read_manifest
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import DataError, MachineError, ModelError, RecipeError
from mllm_assets.evaluation.forgetting import PLAIN_QUESTIONS, measure_forgetting, unrelated_entries
from mllm_assets.evaluation.gates import GateSpec, evaluate_gates
from mllm_assets.evaluation.metrics import compute_metrics
from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.evaluation.table import SCHEMA, predictions_digest
from mllm_assets.inference.answerer import Answerer
from mllm_assets.recipe.asking import Sampling
from mllm_assets.training.models import tiny as tiny_gemma
from mllm_assets.worker.launch import run_worker
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import Accelerator, EvaluateTask, EvaluationSettings
from tests.worker_tasks import evaluation

pytestmark = pytest.mark.integration
GOLDEN = Path(__file__).parents[1] / "golden" / "parity"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def blind_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parity model with a projector of zeros: every image looks the same to it."""
    directory = tmp_path_factory.mktemp("blind") / "model"
    shutil.copytree(GOLDEN / "model", directory)
    weights = load_file(directory / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("mm_input_projection_weight")]
    save_file(weights | {name: torch.zeros_like(weights[name])}, directory / "model.safetensors", {"format": "pt"})
    return directory


def task_for(base: Path, directory: Path, **changes: Any) -> EvaluateTask:
    known = {"model_dir": GOLDEN / "model", "data_dir": GOLDEN / "data", "max_new_tokens": 8, "batch_size": 3}
    return evaluation(**{**known, "base_model_dir": base, "directory": directory, **changes})


@pytest.fixture(scope="module")
def evaluated(blind_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("predictions") / "digest"
    evaluate_task(task_for(blind_model, directory), Reporter())
    return directory


def test_predictions_hold_a_row_per_model_and_sample(evaluated: Path) -> None:
    table = pq.read_table(evaluated / "predictions.parquet")
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    assert [(row["model"], row["row_index"]) for row in rows] == [(m, i) for m in ("base", "tuned") for i in range(8)]
    assert rows[0]["prompt"] == "Describe this picture." and rows[0]["reference"] == "crayon"
    assert rows[1]["prompt"] == "Only the name, please." and rows[1]["reference"] == "unlocked"
    assert rows[0]["images"] == ["images/emoji_048.png"]
    manifest = json.loads((evaluated / "manifest.json").read_text())
    assert manifest["entries"] == {"gemma3_vlm_val": 8} and manifest["digest"] == predictions_digest(table)
    assert find_damage(evaluated) is None and (evaluated / "gallery.html").stat().st_size > 10_000


def test_unrelated_questions_are_asked_too_and_change_nothing_that_judges(
    evaluated: Path, blind_model: Path, tmp_path: Path
) -> None:
    entry = unrelated_entries(Dataset(GOLDEN / "data"), [PLAIN_QUESTIONS], [])[PLAIN_QUESTIONS]
    settings = EvaluationSettings(max_new_tokens=8, batch_size=3, max_samples=8, unrelated=(PLAIN_QUESTIONS,))
    task = task_for(blind_model, tmp_path / "digest")
    evaluate_task(replace(task, settings=settings, unrelated_digests={PLAIN_QUESTIONS: entry.digest}), Reporter())
    judging = pq.read_table(tmp_path / "digest" / "predictions.parquet")
    alone = pq.read_table(evaluated / "predictions.parquet")
    floats = ["loss_nats", "loss_shuffled_nats", "latency_s"]
    assert judging.drop_columns(floats).equals(alone.drop_columns(floats))
    assert judging["loss_nats"].to_pylist() == pytest.approx(alone["loss_nats"].to_pylist(), rel=1e-5), "other batches"
    manifest = read_manifest(tmp_path / "digest")
    assert manifest["entries"] == {"gemma3_vlm_val": 8} and manifest["digest"] != predictions_digest(judging)
    measured = measure_forgetting(tmp_path / "digest")[PLAIN_QUESTIONS]
    assert measured["num_samples"] == 8
    assert measured["gains"]["loss"]["mean"] == 0.0, "without a picture the projector, by which they differ, is unused"
    assert measure_forgetting(evaluated) == {}


def test_the_loss_is_that_of_the_reference_trajectory() -> None:
    """LLaMA-Factory's first step, before any update: the mean over two micro-batches of two rows."""
    answerer = Answerer(GOLDEN / "model")
    rows = [answerer.encoder.encode(row) for row in Dataset(GOLDEN / "data").entry("gemma3_vlm_train").rows[:4]]
    losses = answerer.losses(rows)
    means = [sum(loss * num for loss, num in pair) / sum(num for _, num in pair) for pair in (losses[:2], losses[2:])]
    reference = json.loads((GOLDEN / "reference" / "freeze.json").read_text())["losses"][0]
    assert sum(means) / 2 == pytest.approx(reference, abs=5e-6)


def test_batches_give_the_answers_and_losses_of_single_rows() -> None:
    """Left padding with wrong positions or token types changes answers without any error."""
    answerer = Answerer(GOLDEN / "model")
    rows = Dataset(GOLDEN / "data").entry("gemma3_vlm_train").read(max_samples=12)
    prompts = [answerer.encoder.encode_prompt(row) for row in rows]
    together = [answer.text for answer in answerer.answers(prompts, Sampling(max_new_tokens=12))]
    assert together == [answerer.answers([prompt], Sampling(max_new_tokens=12))[0].text for prompt in prompts]
    scored = [answerer.encoder.encode(row) for row in rows]
    alone = [answerer.losses([row])[0] for row in scored]
    assert [num for _, num in answerer.losses(scored)] == [num for _, num in alone]
    assert [loss for loss, _ in answerer.losses(scored)] == pytest.approx([loss for loss, _ in alone], abs=1e-5)


def test_another_image_changes_the_loss_only_of_a_model_that_sees_it(evaluated: Path) -> None:
    rows = pq.read_table(evaluated / "predictions.parquet").to_pylist()
    change = {
        model: max(abs(row["loss_shuffled_nats"] - row["loss_nats"]) for row in rows if row["model"] == model)
        for model in ("base", "tuned")
    }
    assert change["base"] == 0
    assert change["tuned"] > 1e-3


def test_random_weights_do_not_pass_the_gates(evaluated: Path) -> None:
    answers = [row.messages[-1].content for row in Dataset(GOLDEN / "data").entry("gemma3_vlm_train").rows]
    metrics = compute_metrics(pq.read_table(evaluated / "predictions.parquet"), answers)
    gates = {gate.name: gate.passed for gate in evaluate_gates(metrics, GateSpec())}
    assert not gates["beats_most_common_answer"] and not gates["the_model_uses_the_image"]


def test_batch_size_and_a_second_evaluation_change_nothing(evaluated: Path, blind_model: Path, tmp_path: Path) -> None:
    task = task_for(blind_model, tmp_path / "p", batch_size=8)
    first = evaluate_task(task, Reporter())
    other = pq.read_table(tmp_path / "p" / "predictions.parquet").to_pylist()
    for row, expected in zip(other, pq.read_table(evaluated / "predictions.parquet").to_pylist(), strict=True):
        assert row["answer"] == expected["answer"]
        assert row["loss_nats"] == pytest.approx(expected["loss_nats"], abs=1e-5)
        assert row["loss_shuffled_nats"] == pytest.approx(expected["loss_shuffled_nats"], abs=1e-5)
    before = (tmp_path / "p" / "manifest.json").stat().st_mtime_ns
    assert evaluate_task(task, Reporter()) == replace(first, model_files={}), "no file of a model was read again"
    assert (tmp_path / "p" / "manifest.json").stat().st_mtime_ns == before


def test_the_same_task_gives_the_same_digest(evaluated: Path, blind_model: Path, tmp_path: Path) -> None:
    again = evaluate_task(task_for(blind_model, tmp_path / "p"), Reporter())
    assert again.manifest["digest"] == json.loads((evaluated / "manifest.json").read_text())["digest"]


def test_progress_is_reported_for_both_models(blind_model: Path, tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    reporter = Reporter(emit=said.append, min_interval_s=0)
    evaluate_task(task_for(blind_model, tmp_path / "p", max_samples=4, batch_size=4), reporter)
    assert [(m["stage"], m["done"], m["total"]) for m in said] == [
        (f"evaluate {model} model", done, 12) for model in ("base", "tuned") for done in (4, 8, 12)
    ]


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "drawn"])
def test_an_evaluation_that_ended_early_goes_on_by_row(blind_model: Path, tmp_path: Path, do_sample: bool) -> None:
    """It began again with the first row of the first model."""
    task = task_for(blind_model, tmp_path / "p", do_sample=do_sample)
    whole = evaluate_task(replace(task, directory=tmp_path / "whole"), Reporter()).manifest
    said: list[dict[str, Any]] = []

    def ended_after(num_batches: int) -> None:
        def emit(message: dict[str, Any]) -> None:
            said.append(message)
            if len(said) == num_batches:
                raise KeyboardInterrupt

        said.clear()
        with pytest.raises(KeyboardInterrupt):
            evaluate_task(task, Reporter(emit=emit, min_interval_s=0))

    ended_after(2)
    first = said[-1]["done"]
    ended_after(4)  # what is known is said first
    assert said[0]["done"] == first and said[-1]["done"] > first
    last = said[-1]
    said.clear()
    resumed = evaluate_task(task, Reporter(emit=said.append, min_interval_s=0)).manifest
    assert [said[0][key] for key in ("stage", "done")] == [last[key] for key in ("stage", "done")]
    assert resumed["digest"] == whole["digest"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "whole"]


def test_what_cannot_be_evaluated_is_named_and_leaves_nothing(blind_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "p"
    with pytest.raises(RecipeError, match="gemma3_vlm_val"):
        evaluate_task(task_for(blind_model, target, entries=["gemma3_vlm_vall"]), Reporter())
    with pytest.raises(ModelError, match="nowhere does not exist. Give a model directory"):
        evaluate_task(task_for(tmp_path / "nowhere", target), Reporter())
    if not torch.cuda.is_available():
        with pytest.raises(MachineError, match="cuda was asked for"):
            evaluate_task(task_for(blind_model, target, accelerator=Accelerator(device="cuda")), Reporter())
    assert not target.exists()


def test_a_damaged_image_is_named(blind_model: Path, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "data", tmp_path / "data")
    (tmp_path / "data" / "images" / "emoji_050.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(DataError, match=r"emoji_050.png of row gemma3_vlm_val\[2\] cannot be used"):
        evaluate_task(task_for(blind_model, tmp_path / "p", data_dir=tmp_path / "data"), Reporter())
    assert not (tmp_path / "p").exists()


def test_the_worker_returns_the_manifest_and_the_errors_class(blind_model: Path, tmp_path: Path) -> None:
    task = task_for(blind_model, tmp_path / "p", max_samples=2, max_new_tokens=2)
    result = run_worker(task)
    assert result.manifest["entries"] == {"gemma3_vlm_val": 2} and find_damage(tmp_path / "p") is None
    with pytest.raises(ModelError, match="is not a model directory: it has neither config.json nor model/config.json"):
        run_worker(replace(task, model_dir=tmp_path, directory=tmp_path / "q"))


@pytest.mark.slow
def test_the_demos_evaluation_answers_in_batches_and_computes_one_token_a_step(tmp_path: Path) -> None:
    """120 samples, both models, all 64 tokens of a model that never ends its turn: the demo has 3 minutes in all."""
    tiny_gemma.build(tmp_path / "tiny")
    samples = pq.read_table(Path(sample_data.__file__).parent / "emoji.parquet").slice(0, 120).to_pylist()
    (tmp_path / "data" / "images").mkdir(parents=True)
    rows = []
    for index, sample in enumerate(samples):
        (tmp_path / "data" / "images" / f"{index}.png").write_bytes(sample["image"]["bytes"])
        question = {"role": "user", "content": "<image>What kind of emoji is this?"}
        answer = {"role": "assistant", "content": sample["subgroup"]}
        rows.append({"messages": [question, answer], "images": [f"images/{index}.png"]})
    info = json.loads((GOLDEN / "data" / "dataset_info.json").read_text())
    (tmp_path / "data" / "val.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    tiny = tmp_path / "tiny"
    more = {"data_dir": tmp_path / "data", "model_dir": tiny, "max_new_tokens": 64, "batch_size": 16}
    task = task_for(tiny, tmp_path / "p", **more)
    widths: list[int] = []

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if type(module).__name__ == "Gemma3TextScaledWordEmbedding":
            widths.append(inputs[0].shape[1])

    with torch.nn.modules.module.register_module_forward_pre_hook(note):
        assert evaluate_task(task, Reporter()).manifest["num_predictions"] == 240
    num_batches = 2 * 8  # of both models, which answer and are scored with the right picture and with another
    assert widths.count(1) == num_batches * 63
    assert len(widths) - widths.count(1) == num_batches * 3
