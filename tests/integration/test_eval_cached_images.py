"""Predictions from the vision tower's cached output: the same answers and losses, and the tower runs once an image."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.evaluation import in_turn
from mllm_assets.evaluation.in_turn import InTurn
from mllm_assets.evaluation.predict import evaluate_task
from mllm_assets.evaluation.table import PREDICTIONS_FILE
from mllm_assets.families.family import FAMILIES
from mllm_assets.file_digests import FileDigests
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches import tower
from mllm_assets.training.caches.features import features_task
from mllm_assets.training.caches.shards import NUM_PROBES
from mllm_assets.training.models.device import Device
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import FeaturesTask
from tests import tiny_families
from tests.worker_tasks import ONE_CPU_THREAD, evaluation

pytestmark = pytest.mark.integration
EACH = [name if name == "qwen3_vl" else pytest.param(name, marks=pytest.mark.slow) for name in tiny_families.FAMILIES]


def recipe(model_type: str, **values: Any) -> TrainSpec:
    keys = {
        "model_name_or_path": "model", "dataset": "gemma3_vlm_train", "eval_dataset": "gemma3_vlm_val",
        "template": next(iter(FAMILIES[model_type].templates)), "do_train": True, "finetuning_type": "lora",
    }  # fmt: skip
    return TrainSpec(**{**keys, **values})


def evaluated(model_dir: Path, data_dir: Path, directory: Path, **changes: Any) -> list[dict[str, Any]]:
    model_type = json.loads((model_dir / "config.json").read_text())["model_type"]
    known = {"recipe": recipe(model_type), "max_new_tokens": 6, "batch_size": 3}
    task = evaluation(model_dir=model_dir, data_dir=data_dir, directory=directory, **{**known, **changes})
    evaluate_task(task, Reporter())
    return pq.read_table(directory / PREDICTIONS_FILE).to_pylist()


def assert_same(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["answer"] for row in rows] == [row["answer"] for row in expected]
    for loss in ("loss_nats", "loss_shuffled_nats"):
        assert [row[loss] for row in rows] == pytest.approx([row[loss] for row in expected], abs=1e-5)


@pytest.fixture
def num_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images went through the tower in each pass."""
    seen: list[int] = []
    compute = tower.image_rows

    def counting(*arguments: Any) -> list[torch.Tensor]:
        rows = compute(*arguments)
        seen.append(len(rows))
        return rows

    monkeypatch.setattr(tower, "image_rows", counting)
    return seen


def test_base_and_tuned_model_share_the_features_that_training_made(
    parity_dir: Path, tmp_path: Path, num_seen: list[int]
) -> None:
    model_dir, data_dir = parity_dir / "model", parity_dir / "data"
    plain = evaluated(model_dir, data_dir, tmp_path / "plain")
    assert num_seen == [], "without the cache nothing is kept"
    features_root = tmp_path / "features"
    task = FeaturesTask(
        recipe=recipe("gemma3"), model_dir=model_dir, data_dir=data_dir, features_root=features_root,
        accelerator=ONE_CPU_THREAD,
    )  # fmt: skip
    features_task(task, Reporter())
    num_seen.clear()
    cached = {"features_root": features_root}
    assert_same(evaluated(model_dir, data_dir, tmp_path / "cached", **cached), plain)
    assert sum(num_seen) <= 2 * (NUM_PROBES + 1), "each model compares a few images with what was kept, and no more"
    assert len(list(features_root.iterdir())) == 1


def test_features_that_are_not_there_are_computed_once_for_both_models(
    parity_dir: Path, tmp_path: Path, num_seen: list[int]
) -> None:
    cached = {"features_root": tmp_path / "features"}
    evaluated(parity_dir / "model", parity_dir / "data", tmp_path / "p", **cached)
    rows = Dataset(parity_dir / "data").entry("gemma3_vlm_val").rows
    num_images = len({path.read_bytes() for row in rows for path in row.images})
    assert num_images <= sum(num_seen) <= num_images + 2 * (NUM_PROBES + 1)


def test_a_recipe_in_bf16_over_a_float32_model_is_evaluated_in_the_models_own_dtype(
    parity_dir: Path, tmp_path: Path
) -> None:
    plain = evaluated(parity_dir / "model", parity_dir / "data", tmp_path / "plain")
    cached = {"features_root": tmp_path / "features", "recipe": recipe("gemma3", bf16=True)}
    assert_same(evaluated(parity_dir / "model", parity_dir / "data", tmp_path / "p", **cached), plain)


@pytest.fixture(scope="module")
def mixed_dir(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several sizes, two in one row, and a row without any."""
    data = tmp_path_factory.mktemp("mixed")
    (data / "images").mkdir()
    rows = json.loads((parity_dir / "data" / "val.json").read_text())
    rows[3] = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}], "images": []}
    for number, name in enumerate(sorted({name for row in rows for name in row["images"]})):
        with Image.open(parity_dir / "data" / name) as image:
            image.resize((40 + 9 * (number % 4), 60 - 7 * (number % 3))).save(data / name)
    (data / "val.json").write_text(json.dumps(rows))
    info = json.loads((parity_dir / "data" / "dataset_info.json").read_text())["gemma3_vlm_val"]
    (data / "dataset_info.json").write_text(json.dumps({"gemma3_vlm_val": {**info, "file_name": "val.json"}}))
    return data


@pytest.mark.slow
@pytest.mark.parametrize("model_type", EACH)
def test_every_family_answers_from_cached_images_as_from_pictures(
    mixed_dir: Path, tmp_path: Path, model_type: str, num_seen: list[int]
) -> None:
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    tiny_families.build(model_type, model_dir)
    plain = evaluated(model_dir, mixed_dir, tmp_path / "plain")
    cached = {"features_root": tmp_path / "features"}
    assert_same(evaluated(model_dir, mixed_dir, tmp_path / "cached", **cached), plain)
    assert num_seen


def test_sampled_answers_repeat_with_their_seed(parity_dir: Path, tmp_path: Path) -> None:
    def ask(name: str, seed: int) -> list[str]:
        sampled = {"do_sample": True, "temperature": 2.0, "seed": seed}
        rows = evaluated(parity_dir / "model", parity_dir / "data", tmp_path / name, **sampled)
        return [row["answer"] for row in rows]

    first = ask("a", 1)
    assert ask("b", 1) == first and ask("c", 2) != first


@pytest.mark.parametrize("trained", [{"fp16": True}, {"bf16": True, "flash_attn": "fa2"}], ids=["fp16", "fa2"])
def test_a_model_is_asked_on_a_device_that_could_not_train_it(
    parity_dir: Path, tmp_path: Path, trained: dict[str, Any], num_seen: list[int]
) -> None:
    """Predictions on the CPU, which a run on a small card advises, were refused as if it were to train there."""
    rows = evaluated(
        parity_dir / "model", parity_dir / "data", tmp_path / "p", recipe=recipe("gemma3", **trained),
        features_root=tmp_path / "features", max_samples=2, max_new_tokens=2,
    )  # fmt: skip
    assert len(rows) == 4 and num_seen, "from cached images"


def test_the_model_before_is_gone_when_the_next_one_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With cached features most families' models refer to themselves: base and tuned model were on the card at once."""
    model_dir = tiny_families.build("qwen3_vl", tmp_path / "model")
    before: list[weakref.ref[Any]] = []
    left: list[bool] = []
    load = in_turn.Answerer

    def loading(*arguments: Any, **options: Any) -> Any:
        left.extend(reference() is not None for reference in before)
        answerer = load(*arguments, **options)
        tower.install(answerer.model)
        before.append(weakref.ref(answerer.model.model))
        return answerer

    monkeypatch.setattr(in_turn, "Answerer", loading)
    models = InTurn(TurnSettings(), Device(kind="cpu", name="", driver="", memory_gib=1.0), FileDigests())
    gc.disable()
    try:
        for _ in range(2):
            models.announce(model_dir)
            models.load(model_dir)
    finally:
        gc.enable()
    assert left == [False]
