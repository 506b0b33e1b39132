"""Each family trains, with its vision features cached and without, resumes bit for bit, and is published strictly."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mllm_assets.errors import RecipeError
from mllm_assets.evaluation.forgetting import PLAIN_QUESTIONS, measure_forgetting
from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.evaluation.table import PREDICTIONS_FILE
from mllm_assets.families.family import Family, family_of
from mllm_assets.inference.generate import generate
from mllm_assets.recipe.asking import Sampling
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches.features import features_task
from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.runs.models import NamedModel
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import CacheSettings, Features, TrainTask
from tests import tiny_any, tiny_families
from tests.worker_tasks import evaluation, features_of, training

pytestmark = pytest.mark.integration

PROJECTOR = {"finetuning_type": "full", "freeze_multi_modal_projector": False, "freeze_language_model": True}
LORA = {"finetuning_type": "lora", "lora_dropout": 0.1, "lora_rank": 4}
LAST_LAYER = {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "freeze_multi_modal_projector": False}
EVERYTHING = {"finetuning_type": "full", "freeze_multi_modal_projector": False, "freeze_vision_tower": False}
# Qwen3-VL represents all in `make test`: pictures of any size, deepstack, token types, no processor without torchvision
EACH = [name if name == "qwen3_vl" else pytest.param(name, marks=pytest.mark.slow) for name in tiny_families.CONFIGS]
# Idefics3 represents those that train by their own files alone: tiles in a dimension of their own, padded by row
ANY = [name if name == "idefics3" else pytest.param(name, marks=pytest.mark.slow) for name in tiny_any.MODELS]


@pytest.fixture(scope="module")
def data_dir(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows, of which one has two images, four a system text and one no image; sizes differ."""
    data = tmp_path_factory.mktemp("data")
    (data / "images").mkdir()
    rows = json.loads((parity_dir / "data" / "train.json").read_text())[:12]
    rows[4] = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}], "images": []}
    for number, name in enumerate(sorted({name for row in rows for name in row["images"]})):
        with Image.open(parity_dir / "data" / name) as image:
            image.resize((40 + 9 * (number % 4), 60 - 7 * (number % 3))).save(data / name)
    (data / "train.json").write_text(json.dumps(rows))
    info = json.loads((parity_dir / "data" / "dataset_info.json").read_text())["gemma3_vlm_train"]
    (data / "dataset_info.json").write_text(json.dumps({"few": {**info, "file_name": "train.json"}}))
    return data


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def build(model_type: str) -> Path:
        directory = folder / model_type
        if not directory.exists():
            directory.mkdir()
            (tiny_any if model_type in tiny_any.MODELS else tiny_families).build(model_type, directory)
        return directory

    return build


def described(model_dir: Path) -> Family:
    return family_of(json.loads((model_dir / "config.json").read_text())["model_type"])


def make_task(model_dir: Path, data_dir: Path, run_dir: Path, *, cached: bool = False, **values: Any) -> TrainTask:
    recipe = {
        "model_name_or_path": "model", "dataset": "few", "eval_dataset": "few", "do_train": True,
        "template": next(iter(described(model_dir).templates)), "learning_rate": 1e-2, "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "logging_steps": 1,
        "save_steps": 3, "eval_strategy": "steps", "eval_steps": 6,
    }  # fmt: skip
    caches = CacheSettings(features_root=run_dir.parent / "features" if cached else None)
    return training(
        TrainSpec(**(recipe | values)), model_dir=model_dir, data_dir=data_dir, run_dir=run_dir, caches=caches
    )


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "trainer_log.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines]


class CountsTower(Reporter):
    """Counts the forward passes of the tower's layers from the first step's end to the last one's."""

    def __init__(self) -> None:
        super().__init__()
        self._num_passes = 0
        self.at_step: dict[int, int] = {}

    def see(self, module: torch.nn.Module, _: Any) -> None:
        self._num_passes += type(module).__name__.endswith(("VisionBlock", "VisionLayer", "EncoderLayer"))

    def progress(self, stage: str, done: int, total: int, **facts: float) -> None:
        if stage == "train":
            self.at_step.setdefault(done, self._num_passes)

    @property
    def in_steps(self) -> int:
        return self.at_step[max(self.at_step)] - self.at_step[min(self.at_step)]


def train_counted(task: TrainTask) -> tuple[dict[str, Any], int]:
    reporter = CountsTower()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(reporter.see)
    try:
        return train_task(task, reporter), reporter.in_steps
    finally:
        handle.remove()


@pytest.mark.parametrize("model_type", EACH)
@pytest.mark.parametrize("values", [PROJECTOR, LAST_LAYER, LORA], ids=["projector", "last_layer", "lora"])
def test_cached_or_not_the_losses_are_the_same(
    model_of: Callable[[str], Path], data_dir: Path, tmp_path: Path, model_type: str, values: dict[str, Any]
) -> None:
    values = values | ({"lora_dropout": 0.0} if values is LORA else {})
    plain, num_plain = train_counted(make_task(model_of(model_type), data_dir, tmp_path / "plain", **values))
    task = make_task(model_of(model_type), data_dir, tmp_path / "cached", cached=True, **values)
    cached, num_cached = train_counted(task)
    assert plain["caches"]["vision_features"] == "turned off (feature_cache: false)" and num_plain > 0
    assert cached["caches"]["vision_features"] == "cached" and num_cached == 0
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)
    assert cached["trainable"] == plain["trainable"]
    before, *after = (
        load_file(directory / "model.safetensors")
        for directory in (model_of(model_type), tmp_path / "plain" / "model", tmp_path / "cached" / "model")
    )
    assert before.keys() == after[0].keys() == after[1].keys()
    keys = tuple(key.rsplit(".", 1)[-1] for key in described(model_of(model_type)).vision_keys)
    frozen = [name for name in before if any(f"{key}." in name for key in keys)]
    assert frozen and all(before[name].equal(after[1][name]) for name in frozen), "the published model has its tower"


def train_and_be_killed(task: TrainTask, step: int) -> int:
    """Train in a process of its own, which is gone by SIGKILL behind a step; a fork saves the libraries' start."""

    class KilledAt(Reporter):
        def progress(self, stage: str, done: int, total: int, **facts: float) -> None:
            if stage == "train" and done == step:
                os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=train_task, args=(task, KilledAt()))
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("model_type", EACH + ANY)
def test_killed_and_run_again_the_weights_are_the_same(
    model_of: Callable[[str], Path], data_dir: Path, tmp_path: Path, model_type: str
) -> None:
    """With cached features, accumulation, LoRA and its dropout; the other families are as Gemma 3 is, or worse."""
    whole = train_task(make_task(model_of(model_type), data_dir, tmp_path / "whole", cached=True, **LORA), Reporter())
    task = make_task(model_of(model_type), data_dir, tmp_path / "run", cached=True, **LORA)
    assert train_and_be_killed(task, step=5) == -signal.SIGKILL
    assert not (tmp_path / "run" / "manifest.json").exists()
    resumed = train_task(task, Reporter())
    assert resumed["resumed_from_step"] == 3
    assert resumed["weights_digest"] == whole["weights_digest"]
    assert resumed["eval_loss"] == whole["eval_loss"]


@pytest.mark.parametrize("model_type", EACH + ANY)
def test_a_tower_that_trains_is_not_cached_and_the_published_model_answers(
    model_of: Callable[[str], Path], data_dir: Path, tmp_path: Path, model_type: str
) -> None:
    task = make_task(model_of(model_type), data_dir, tmp_path / "run", cached=True, **EVERYTHING)
    result, num_passes = train_counted(task)
    assert result["caches"]["vision_features"] == (
        "the vision tower trains, so its output changes at every step"
        if described(model_of(model_type)).is_described
        else f"the vision features of {model_type} are not cached"
    )
    assert num_passes > 0 and losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    reload = result["reload"]
    assert reload["loss_saved"] == reload["loss_reloaded"]
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before = load_file(model_of(model_type) / "model.safetensors")
    assert before.keys() == load_file(tmp_path / "run" / "model" / "model.safetensors").keys()
    image = next((data_dir / "images").glob("*.png"))
    asked = NamedModel(name="asked", directory=tmp_path / "run" / "model")
    answer = generate(asked, [image, image], "<image>What<image>?", Sampling(max_new_tokens=4))
    assert 0 <= answer.num_tokens <= 4
    again = generate(asked, [image, image], "<image>What<image>?", Sampling(max_new_tokens=4))
    assert answer.text == again.text


@pytest.mark.slow
def test_rows_with_pictures_are_packed_and_learnt_from_cached_features(
    model_of: Callable[[str], Path], data_dir: Path, tmp_path: Path
) -> None:
    packed = {"neat_packing": True, "cutoff_len": 400, "per_device_train_batch_size": 1, **LORA}
    result = train_task(make_task(model_of("qwen3_vl"), data_dir, tmp_path / "run", cached=True, **packed), Reporter())
    assert (
        result["caches"]["vision_features"] == "cached" and losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    )
    plain = make_task(
        model_of("qwen3_vl"), data_dir, tmp_path / "plain", **(packed | {"neat_packing": False, "packing": True})
    )
    with pytest.raises(RecipeError, match=r"positions of pictures in Qwen3-VL .* Set neat_packing: true"):
        train_task(plain, Reporter())


@pytest.mark.slow
def test_patches_of_pictures_are_learnt_from_cached_features_as_from_pixels(
    model_of: Callable[[str], Path], data_dir: Path, tmp_path: Path
) -> None:
    shown = {"crop_to_patches": True, "eval_strategy": "no", **PROJECTOR}
    plain = train_task(make_task(model_of("internvl"), data_dir, tmp_path / "plain", **shown), Reporter())
    cached = make_task(model_of("internvl"), data_dir, tmp_path / "cached", cached=True, **shown)
    assert train_task(cached, Reporter())["caches"]["vision_features"] == "cached"
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)
    assert any("parts of pictures beside the whole ones" in warning for warning in plain["warnings"])
    whole = make_task(model_of("internvl"), data_dir, tmp_path / "whole", **(shown | {"crop_to_patches": False}))
    assert any("pictures are shown whole" in warning for warning in train_task(whole, Reporter())["warnings"])
    assert losses(tmp_path / "whole") != losses(tmp_path / "plain")
    with pytest.raises(RecipeError, match="crop_to_patches shows InternVL parts of pictures, and the model is LLaVA"):
        train_task(make_task(model_of("llava"), data_dir, tmp_path / "no", **shown), Reporter())


def test_features_are_shared_by_recipes_and_not_by_families(
    model_of: Callable[[str], Path], data_dir: Path, tmp_path: Path
) -> None:
    def features(model_type: str, **values: Any) -> Features:
        task = make_task(model_of(model_type), data_dir, tmp_path / "run", **values)
        return features_task(features_of(task, tmp_path / "features"), Reporter())

    first = features("qwen3_vl")
    assert features("qwen3_vl", **PROJECTOR) == replace(first, num_computed=0)
    llava = features("llava")
    assert llava.tower_fingerprint != first.tower_fingerprint and llava.num_computed == first.num_images


def test_a_recipe_of_another_family_is_refused_before_anything_is_written(
    model_of: Callable[[str], Path], data_dir: Path, tmp_path: Path
) -> None:
    task = make_task(model_of("llava"), data_dir, tmp_path / "run", template="qwen2_vl")
    with pytest.raises(
        RecipeError, match=r"template is 'qwen2_vl', and the model in .* is LLaVA .* Set template: llava"
    ):
        train_task(task, Reporter())
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_projector_alone_needs_a_picture_in_each_row_of_a_family_that_is_not_described(
    model_of: Callable[[str], Path], data_dir: Path, tmp_path: Path
) -> None:
    """A batch of rows without one has no gradient; described families get a blank picture in it."""
    task = make_task(model_of("idefics3"), data_dir, tmp_path / "run", **PROJECTOR)
    with pytest.raises(RecipeError, match=r"Only connector trains, .* 11 of 12 rows of few .* each row needs one"):
        train_task(task, Reporter())


def test_hidden_states_of_other_families_are_not_cached_and_the_run_says_so(
    model_of: Callable[[str], Path], data_dir: Path, tmp_path: Path
) -> None:
    task = make_task(model_of("qwen3_vl"), data_dir, tmp_path / "run", cached=True, max_steps=2, **LORA)
    caches = CacheSettings(features_root=tmp_path / "features", hidden_states_root=tmp_path / "hidden")
    result = train_task(replace(task, caches=caches), Reporter())
    assert (
        result["caches"]["hidden_states"] == "only the hidden states of Gemma 3 are cached, and this model is Qwen3-VL"
    )


@pytest.mark.parametrize("model_type", EACH + ANY)
def test_predictions_with_pictures_of_other_sizes_in_the_place_of_a_rows_own(
    model_of: Callable[[str], Path], data_dir: Path, tmp_path: Path, model_type: str
) -> None:
    """A picture of another size takes another number of tokens in some families."""
    task = evaluation(
        model_dir=model_of(model_type), data_dir=data_dir, entries=["few"], directory=tmp_path / "predictions",
        max_new_tokens=2, batch_size=4, template=next(iter(described(model_of(model_type)).templates)),
        unrelated=(PLAIN_QUESTIONS,),
    )  # fmt: skip
    manifest = evaluate_task(task, Reporter()).manifest
    table = pq.read_table(tmp_path / "predictions" / PREDICTIONS_FILE).to_pylist()
    assert manifest["num_predictions"] == len(table) == 24
    with_images = [row for row in table if row["images"]]
    assert all(row["loss_nats"] > 0 for row in table) and len(with_images) == 22
    assert any(row["loss_shuffled_nats"] != row["loss_nats"] for row in with_images)
    assert measure_forgetting(tmp_path / "predictions")[PLAIN_QUESTIONS]["num_samples"] == 32, (
        "batches without pictures"
    )
