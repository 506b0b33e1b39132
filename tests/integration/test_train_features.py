"""Cached vision features: the same trajectory, and refused when they are not this tower's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from mllm_assets.artifacts import MANIFEST, find_damage, read_manifest, write_manifest
from mllm_assets.errors import IntegrityError, RecipeError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches import shards
from mllm_assets.training.caches.features import features_task
from mllm_assets.training.caches.shards import TENSORS_FILE
from mllm_assets.training.loop.engine import train_task
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import CacheSettings, Features, FeaturesTask, TrainTask
from tests.golden import fidelity_data
from tests.worker_tasks import features_of, training

pytestmark = pytest.mark.integration


def make_task(
    parity_dir: Path, folder: Path, *, read: Path | None = None, model_dir: Path | None = None,
    data_dir: Path | None = None, **overrides: Any,
) -> TrainTask:  # fmt: skip
    values = {
        "model_name_or_path": "model", "dataset": "gemma3_vlm_train", "eval_dataset": "gemma3_vlm_val",
        "template": "gemma3", "do_train": True, "finetuning_type": "freeze", "freeze_multi_modal_projector": False,
        "learning_rate": 1e-3, "per_device_train_batch_size": 4, "max_steps": 8, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4,
    }  # fmt: skip
    return training(
        TrainSpec(**{**values, **overrides}), model_dir=model_dir or parity_dir / "model",
        data_dir=data_dir or parity_dir / "data", run_dir=folder / "run", caches=CacheSettings(features_dir=read),
    )  # fmt: skip


def make_features(parity_dir: Path, folder: Path, **overrides: Any) -> FeaturesTask:
    return features_of(make_task(parity_dir, folder, **overrides), folder / "features")


@pytest.fixture(scope="module")
def made(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Features]:
    folder = tmp_path_factory.mktemp("made")
    result = features_task(make_features(parity_dir, folder), Reporter())
    return folder / "features" / result.directory, result


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "trainer_log.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines]


@pytest.mark.parametrize("method", ["freeze", "full", "lora"])
def test_cached_features_give_the_trajectory_of_the_tower(
    parity_dir: Path, tmp_path: Path, made: tuple[Path, Features], method: str
) -> None:
    values = {"finetuning_type": method, "freeze_language_model": method == "full"}
    with_tower = make_task(parity_dir, tmp_path / "tower", **values)
    cached = make_task(parity_dir, tmp_path / "cached", read=made[0], **values)
    expected, result = train_task(with_tower, Reporter()), train_task(cached, Reporter())
    assert losses(tmp_path / "cached" / "run") == pytest.approx(losses(tmp_path / "tower" / "run"), abs=2e-6)
    assert result["caches"]["vision_features"] == "cached"
    assert expected["caches"]["vision_features"] == "turned off (feature_cache: false)"
    assert result["trainable"] == expected["trainable"]
    # the published model has its tower back
    model, other = (load_file(tmp_path / name / "run" / "model" / "model.safetensors") for name in ("cached", "tower"))
    assert model.keys() == other.keys()
    assert all(model[name].equal(other[name]) for name in model if "vision_tower" in name)


def only_shard(directory: Path) -> Path:
    [shard] = directory.iterdir()
    return shard


def test_one_tensor_per_image_and_nothing_is_computed_again(
    parity_dir: Path, tmp_path: Path, made: tuple[Path, Features]
) -> None:
    directory, result = made
    assert find_damage(only_shard(directory)) is None
    features = load_file(only_shard(directory) / TENSORS_FILE)
    assert len(features) == result.num_images == result.num_computed
    assert {tuple(feature.shape) for feature in features.values()} == {(4, 32)}
    again = features_task(features_of(make_task(parity_dir, tmp_path), directory.parent), Reporter())
    assert again == replace(result, num_computed=0)


def test_a_larger_dataset_computes_only_the_images_that_are_new(parity_dir: Path, tmp_path: Path) -> None:
    some = features_task(make_features(parity_dir, tmp_path, max_samples=5), Reporter())
    rest = features_task(make_features(parity_dir, tmp_path), Reporter())
    assert 0 < some.num_computed < rest.num_images == rest.num_computed + some.num_computed
    other_recipe = features_task(make_features(parity_dir, tmp_path, finetuning_type="lora", seed=7), Reporter())
    assert other_recipe.num_computed == 0 and other_recipe.digest == rest.digest != some.digest


def test_features_that_were_interrupted_go_on_behind_the_last_shard(
    parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "NUM_TENSORS_PER_SHARD", 8)

    class Killed(Exception):
        pass

    class KilledInThirdShard(Reporter):
        def progress(self, stage: str, done: int, total: int, **facts: float) -> None:
            if done >= 20:
                raise Killed

    task = make_features(parity_dir, tmp_path)
    with pytest.raises(Killed):
        features_task(task, KilledInThirdShard())
    result = features_task(task, Reporter())
    assert result.num_computed == result.num_images - 16
    assert not list((tmp_path / "features" / result.directory).glob(".*"))


def test_another_tower_is_refused(parity_dir: Path, tmp_path: Path, made: tuple[Path, Features]) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(parity_dir / "model", model_dir)
    weights = load_file(model_dir / "model.safetensors")
    name = next(
        name for name in weights if name.endswith("vision_model.post_layernorm.bias") or "post_layernorm.bias" in name
    )
    weights[name] = weights[name] + 1
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    task = make_task(parity_dir, tmp_path, read=made[0], model_dir=model_dir)
    with pytest.raises(IntegrityError, match=r"are of tower \w+, and this model's is \w+: .* Make them again"):
        train_task(task, Reporter())


def test_values_that_are_not_the_towers_are_refused(
    parity_dir: Path, tmp_path: Path, made: tuple[Path, Features]
) -> None:
    """The manifest fits, the numbers do not: a few images are computed afresh before the first step."""
    directory = tmp_path / made[0].name
    shutil.copytree(made[0], directory)
    shard = only_shard(directory)
    names = read_manifest(shard)["names"]
    wrong = {name: feature + 0.5 for name, feature in load_file(shard / TENSORS_FILE).items()}
    save_file(wrong, shard / TENSORS_FILE)
    (shard / MANIFEST).unlink()
    write_manifest(shard, {"names": names})
    task = make_task(parity_dir, tmp_path, read=directory)
    with pytest.raises(IntegrityError, match=r"The cached vision features of row .* differ from the tower's output by"):
        train_task(task, Reporter())


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_damaged_features_are_refused(parity_dir: Path, tmp_path: Path, made: tuple[Path, Features]) -> None:
    directory = tmp_path / made[0].name
    shutil.copytree(made[0], directory)
    flip_last_bit(only_shard(directory) / TENSORS_FILE)
    task = make_task(parity_dir, tmp_path, read=directory)
    with pytest.raises(
        IntegrityError, match=r"is damaged: tensors.safetensors does not match its digest\. Run mllm-assets doctor"
    ):
        train_task(task, Reporter())


def test_damaged_features_are_made_again_by_the_step_that_makes_them(
    parity_dir: Path, tmp_path: Path, made: tuple[Path, Features]
) -> None:
    directory = tmp_path / "features" / made[0].name
    shutil.copytree(made[0], directory)
    flip_last_bit(only_shard(directory) / TENSORS_FILE)
    reporter = Reporter()
    result = features_task(make_features(parity_dir, tmp_path), reporter)
    assert result.num_computed == result.num_images and find_damage(only_shard(directory)) is None
    assert "are computed again" in reporter.warnings[0]


def test_an_image_that_changed_is_named(parity_dir: Path, tmp_path: Path, made: tuple[Path, Features]) -> None:
    shutil.copytree(parity_dir / "data", tmp_path / "data")
    Image.new("RGB", (56, 56), "red").save(tmp_path / "data" / "images" / "emoji_000.png")
    task = make_task(parity_dir, tmp_path, read=made[0], data_dir=tmp_path / "data")
    with pytest.raises(
        IntegrityError, match=r"emoji_000\.png has no cached vision features .* Materialise vision_features"
    ):
        train_task(task, Reporter())


def test_a_tower_that_trains_cannot_be_cached(parity_dir: Path, tmp_path: Path, made: tuple[Path, Features]) -> None:
    task = make_task(parity_dir, tmp_path, read=made[0], finetuning_type="full", freeze_vision_tower=False)
    with pytest.raises(RecipeError, match=r"freeze_vision_tower is false, so the tower trains"):
        features_task(features_of(task, tmp_path / "features"), Reporter())
    with pytest.raises(RecipeError, match=r"cannot replace a tower that trains \(\d+ parameters"):
        train_task(task, Reporter())


def test_loader_processes_read_the_cache_too(parity_dir: Path, tmp_path: Path, made: tuple[Path, Features]) -> None:
    task = make_task(parity_dir, tmp_path, read=made[0], dataloader_num_workers=1, max_steps=2)
    assert train_task(task, Reporter())["num_steps"] == 2


@pytest.mark.slow
def test_parts_of_pictures_are_cached_with_them_and_give_the_trajectory_of_the_tower(
    parity_dir: Path, tmp_path: Path
) -> None:
    """`image_do_pan_and_scan` on pictures of which three are long enough."""
    fidelity_data.write(tmp_path / "data")
    found, reporter = {}, Reporter()
    for name in ("cached", "tower"):
        spec = make_task(
            parity_dir, tmp_path / name, dataset="every_mode", eval_dataset="one_image", image_do_pan_and_scan=True,
            data_dir=tmp_path / "data",
        ).recipe  # fmt: skip
        result = train_task(
            training(
                spec, model_dir=parity_dir / "model", data_dir=tmp_path / "data", run_dir=tmp_path / name / "run",
                cache_dir=tmp_path / "cache" if name == "cached" else None,
            ),
            reporter,
        )  # fmt: skip
        found[name] = losses(tmp_path / name / "run")
        assert (result["caches"]["vision_features"] == "cached") == (name == "cached")
    assert found["cached"] == pytest.approx(found["tower"], abs=2e-6)
    assert any("3 of 11 rows show 7 parts of pictures" in warning for warning in reporter.warnings)
