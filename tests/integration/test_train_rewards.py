"""Learning from rewards: answers are learnt as they were drawn, from caches, resumed exactly, and rewards rise."""

import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mllm_assets.errors import DataError, RecipeError
from mllm_assets.evaluation.scores import METRICS, Metric, register
from mllm_assets.inference.answerer import Answerer
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches.prepare import plan_caches
from mllm_assets.training.encoding.row import IGNORE_INDEX
from mllm_assets.training.loop import loss, memory
from mllm_assets.training.loop.engine import open_run, prepare_run, train_task
from mllm_assets.training.loop.group_tuner import GroupTuner, as_row
from mllm_assets.training.models.load import base_model
from mllm_assets.training.models.tiny import build
from mllm_assets.worker.protocol import Reporter
from tests import tiny_families
from tests.interruption import EXACT_FILES
from tests.shapes import BRIEFLY, REWARDED, trained, write_shapes
from tests.worker_tasks import training

pytestmark = pytest.mark.integration

QUICK = {
    "model_name_or_path": "model", "dataset": "gemma3_vlm_train", "template": "gemma3", "do_train": True,
    "stage": "grpo", "reward": {"rouge_l": 1.0, "character_error_rate": -0.1}, "num_generations": 2,
    "max_completion_length": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4,
    "max_samples": 6, "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-3,
}  # fmt: skip


LONG = [
    {"role": "user", "content": f"<image>{' why' * 5000}"},
    {"role": "assistant", "content": "circle"},
]


def quick_task(parity_dir: Path, run_dir: Path, **values: Any) -> Any:
    spec = TrainSpec(**{**QUICK, **values})
    cache_dir = run_dir.parent / "cache"
    return training(
        spec, model_dir=parity_dir / "model", data_dir=parity_dir / "data", run_dir=run_dir, cache_dir=cache_dir
    )


@pytest.mark.parametrize("method", [{"lora_dropout": 0.5}, {"finetuning_type": "full", "bf16": False}], ids=str)
def test_answers_are_learnt_with_the_probabilities_with_which_they_are_drawn(
    parity_dir: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """Else a step would not follow the gradient of the reward, which falls in the end."""
    task = quick_task(parity_dir, tmp_path / "run", **method)
    setup = open_run(task, Reporter())
    prepared = prepare_run(task, setup, Reporter())
    tuner = prepared.trainer
    assert isinstance(tuner, GroupTuner)
    rows = sorted(setup.inputs.train_rows[:4], key=lambda row: len(row.input_ids))
    answers = tuner.rewards.draw([rows[0], rows[-1]], seed=3)
    assert [answer.ids for answer in answers] == [a.ids for a in tuner.rewards.draw([rows[0], rows[-1]], seed=3)]
    assert len({answer.ids for answer in answers}) > 1
    core: Any = base_model(tuner.model)
    asker = tuner.rewards._answerer  # pyright: ignore[reportAttributeAccessIssue]
    asked = asker.asking_collator([answer.prompt for answer in answers])  # padded on the left, unlike what is learnt
    del asked["labels"]
    never = [*tuner.rewards.never]
    with loss.own_head(core), torch.no_grad():
        core.eval()
        drawn = core.generate(
            **asked, do_sample=True, top_k=0, max_new_tokens=4, suppress_tokens=never, eos_token_id=asker.stop_ids,
            output_logits=True, return_dict_in_generate=True, pad_token_id=asker.asking_collator.pad_id,
        )  # fmt: skip
    num_asked = asked["input_ids"].shape[1]
    logits = torch.stack(drawn.logits, 1).float()
    logits[..., never] = float("-inf")
    again = []
    for answer, ids in zip(answers, drawn.sequences[:, num_asked:].tolist(), strict=True):
        end = next((place + 1 for place, token in enumerate(ids) if token in asker.stop_ids), len(ids))
        again.append(replace(answer, ids=tuple(ids[:end])))
    batch = prepared.collator([*map(as_row, again)])
    tuner.model.train()
    with torch.no_grad():
        learnt = tuner._logps(tuner.model, batch)
    for place, answer in enumerate(again):
        said = logits[place].log_softmax(-1)[range(len(answer.ids)), list(answer.ids)]
        counts = batch["shift_labels"][place] != IGNORE_INDEX
        torch.testing.assert_close(learnt[place][counts], said, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_no_answer_has_an_images_token_and_each_can_end(tmp_path: Path, family: str) -> None:
    """The tiny Qwen3.5's tokenizer has a special token for which the model has no row."""
    answerer = Answerer(tiny_families.build(family, tmp_path), TurnSettings(template=family))
    never = answerer.never_drawn
    assert answerer.encoder.image_token_id in never and not {*never} & {*answerer.stop_ids}
    assert max(never) < answerer.model.config.get_text_config().vocab_size
    thought = answerer.tokenizer.encode("".join(answerer.encoder.template.thought), add_special_tokens=False)
    assert thought and not {*never} & {*thought}


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_resumed_run_ends_with_the_same_bits_and_no_step_runs_the_tower(
    parity_dir: Path, tmp_path: Path, beta: float
) -> None:
    """What is drawn follows from seed and step; the reference is the model that the run starts from."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    manifest = train_task(quick_task(parity_dir, whole, beta=beta), Reporter())
    assert manifest["caches"]["vision_features"] == "cached"
    log = [json.loads(line) for line in (whole / "trainer_log.jsonl").read_text().splitlines()]
    told = ("reward", "reward_std", "frac_reward_zero_std", "rewards/rouge_l", "completions/mean_length")
    assert all(key in line for key in told for line in log)
    assert all(("kl" in line) == bool(beta) for line in log)
    assert manifest["final_reward"] == log[-1]["reward"] and manifest["num_steps"] == 4
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    for name in ("run.json", "trainer_log.jsonl"):
        shutil.copy(whole / name, cut)
    train_task(quick_task(parity_dir, cut, beta=beta), Reporter())
    for name in EXACT_FILES:
        assert (cut / "checkpoint-4" / name).read_bytes() == (whole / "checkpoint-4" / name).read_bytes(), name


def test_the_memory_of_a_step_counts_every_answer_and_the_reference(parity_dir: Path, tmp_path: Path) -> None:
    setup = open_run(quick_task(parity_dir, tmp_path / "run", max_completion_length=32), Reporter())
    plan = plan_caches(setup)

    def needed(**values: Any) -> memory.MemoryEstimate:
        return memory.estimate(replace(setup, spec=replace(setup.spec, **values)), plan)

    few = needed()
    assert needed(num_generations=8).activations_gib > 3 * few.activations_gib
    assert needed(max_completion_length=256).activations_gib > 2 * few.activations_gib
    assert needed(beta=0.1).weights_gib == pytest.approx(few.weights_gib + few.gradients_gib)


@pytest.fixture
def shortness() -> Any:
    """A metric of a plugin."""
    register(
        Metric(
            name="shortness", unit="0 and less", definition="characters, negative",
            score=lambda given: np.array([-float(len(text)) for text in given.answers]),
        )
    )  # fmt: skip
    yield
    del METRICS["shortness"]


def test_a_plugins_metric_can_be_the_reward(parity_dir: Path, tmp_path: Path, shortness: None) -> None:
    task = quick_task(parity_dir, tmp_path / "run", reward={"shortness": 2.0}, max_steps=1, save_strategy="no")
    train_task(task, Reporter())
    [line] = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    assert line["reward"] == pytest.approx(2 * line["rewards/shortness"]) and line["reward"] < 0


def test_a_metric_that_gives_one_value_for_all_answers_is_no_reward(parity_dir: Path, tmp_path: Path) -> None:
    register(Metric(name="one", unit="", definition="", score=lambda given: np.ones(1)))
    try:
        task = quick_task(parity_dir, tmp_path / "run", reward={"one": 1.0}, max_steps=1, save_strategy="no")
        with pytest.raises(RecipeError, match=r"one gave 1 values for \d+ answers: expected one for each\."):
            train_task(task, Reporter())
    finally:
        del METRICS["one"]


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"label": None}, RecipeError, "of shapes: 1 of 8 rows have no label, the first is circle. Take it out of the"),
        (
            {"messages": LONG},
            DataError,
            "Row circle: The prompt has .* tokens, its images .*take the row out",
        ),
        ({"id": "square"}, DataError, "Two rows of shapes have the id square"),
    ],
)
def test_rows_that_cannot_be_rewarded_are_refused_before_the_first_step(
    parity_dir: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    data_dir = write_shapes(tmp_path / "data", **changes)
    with pytest.raises(error, match=text):
        trained({**REWARDED, "max_steps": 1}, parity_dir / "model", data_dir, tmp_path / "run")


def test_texts_are_rewarded_beside_labels_too_and_a_metric_of_objects_says_what_it_was_given(
    parity_dir: Path, tmp_path: Path
) -> None:
    """Answers that are nearly right are worth something, of which a model learns that is never right."""
    data_dir = write_shapes(tmp_path / "data")
    partly = {**REWARDED, "reward": {"character_error_rate": -1.0}, "max_steps": 1}
    [line] = trained(partly, parity_dir / "model", data_dir, tmp_path / "run")
    assert line["rewards/character_error_rate"] > 0 and line["reward"] < 0
    with pytest.raises(RecipeError, match="json_valid .* of the kind that json_valid compares, such as 'circle'"):
        trained({**partly, "reward": {"json_valid": 1.0}}, parity_dir / "model", data_dir, tmp_path / "other")


@pytest.mark.slow
def test_the_reward_rises(tmp_path: Path) -> None:
    """From about a third to more than a half; `benchmarks/rewards.py` trains on, to 0.9 and more."""
    build(tmp_path / "model")
    data_dir = write_shapes(tmp_path / "data")
    trained(BRIEFLY, tmp_path / "model", data_dir, tmp_path / "first")
    log = trained(
        {**REWARDED, "max_steps": 45, "warmup_steps": 10}, tmp_path / "first" / "model", data_dir, tmp_path / "second"
    )
    rewards = [line["reward"] for line in log]
    assert statistics.mean(rewards[-10:]) > statistics.mean(rewards[:5]) + 0.1
