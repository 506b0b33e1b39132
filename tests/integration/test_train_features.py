"""Cached vision features: the same trajectory, and refused when they are not this tower's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from mllm_assets.artifacts import MANIFEST, find_damage, read_manifest, write_manifest
from mllm_assets.errors import IntegrityError, RecipeError
from mllm_assets.training.engine import train_task
from mllm_assets.training.features import FEATURES_FILE, TENSOR, features_task
from mllm_assets.training.protocol import Reporter
from mllm_assets.training.spec import TrainSpec

pytestmark = pytest.mark.integration


def make_request(parity_dir: Path, folder: Path, **overrides: Any) -> dict[str, Any]:
    values = {
        "model_name_or_path": "model", "dataset": "gemma3_vlm_train", "eval_dataset": "gemma3_vlm_val",
        "template": "gemma3", "do_train": True, "finetuning_type": "freeze", "freeze_multi_modal_projector": False,
        "learning_rate": 1e-3, "per_device_train_batch_size": 4, "max_steps": 8, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4,
    }  # fmt: skip
    return {
        "recipe": TrainSpec(**{**values, **overrides}).to_dict(),
        "model_dir": str(parity_dir / "model"),
        "data_dir": str(parity_dir / "data"),
        "run_dir": str(folder / "run"),
        "features_root": str(folder / "features"),
        "accelerator": {"device": "cpu", "num_threads": 1},
    }


@pytest.fixture(scope="module")
def made(parity_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("made")
    result = features_task(make_request(parity_dir, folder), Reporter())
    return folder / "features" / result["directory"], result


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "trainer_log.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines]


@pytest.mark.parametrize("method", ["freeze", "full", "lora"])
def test_cached_features_give_the_trajectory_of_the_tower(
    parity_dir: Path, tmp_path: Path, made: tuple[Path, dict[str, Any]], method: str
) -> None:
    values = {"finetuning_type": method, "freeze_language_model": method == "full"}
    with_tower = make_request(parity_dir, tmp_path / "tower", **values)
    cached = make_request(parity_dir, tmp_path / "cached", **values) | {"features_dir": str(made[0])}
    expected, result = train_task(with_tower, Reporter()), train_task(cached, Reporter())
    assert losses(tmp_path / "cached" / "run") == pytest.approx(losses(tmp_path / "tower" / "run"), abs=2e-6)
    assert result["features"] and not expected["features"]
    assert result["trainable"] == expected["trainable"]
    # the published model has its tower back
    model, other = (load_file(tmp_path / name / "run" / "model" / "model.safetensors") for name in ("cached", "tower"))
    assert model.keys() == other.keys()
    assert all(model[name].equal(other[name]) for name in model if "vision_tower" in name)


def test_one_row_per_image_and_the_same_digest_again(
    parity_dir: Path, tmp_path: Path, made: tuple[Path, dict[str, Any]]
) -> None:
    directory, result = made
    assert find_damage(directory) is None
    assert load_file(directory / FEATURES_FILE)[TENSOR].shape == (result["num_images"], 4, 32)
    again = features_task(make_request(parity_dir, tmp_path), Reporter())
    assert again == result


def test_another_tower_is_refused(parity_dir: Path, tmp_path: Path, made: tuple[Path, dict[str, Any]]) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(parity_dir / "model", model_dir)
    weights = load_file(model_dir / "model.safetensors")
    name = next(
        name for name in weights if name.endswith("vision_model.post_layernorm.bias") or "post_layernorm.bias" in name
    )
    weights[name] = weights[name] + 1
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    request = make_request(parity_dir, tmp_path) | {"features_dir": str(made[0]), "model_dir": str(model_dir)}
    with pytest.raises(IntegrityError, match=r"are of tower \w+, and this model's is \w+: .* Make them again"):
        train_task(request, Reporter())


def test_values_that_are_not_the_towers_are_refused(
    parity_dir: Path, tmp_path: Path, made: tuple[Path, dict[str, Any]]
) -> None:
    """The manifest fits, the numbers do not: a few images are computed afresh before the first step."""
    directory = tmp_path / "features"
    shutil.copytree(made[0], directory)
    payload = {key: value for key, value in read_manifest(directory).items() if key not in ("files", "engine_version")}
    features = load_file(directory / FEATURES_FILE)
    save_file({TENSOR: features[TENSOR] + 0.5}, directory / FEATURES_FILE)
    (directory / MANIFEST).unlink()
    write_manifest(directory, payload)
    request = make_request(parity_dir, tmp_path) | {"features_dir": str(directory)}
    with pytest.raises(IntegrityError, match=r"The cached vision features of row .* differ from the tower's output by"):
        train_task(request, Reporter())


def test_damaged_features_are_refused(parity_dir: Path, tmp_path: Path, made: tuple[Path, dict[str, Any]]) -> None:
    directory = tmp_path / "features"
    shutil.copytree(made[0], directory)
    data = bytearray((directory / FEATURES_FILE).read_bytes())
    data[-1] ^= 1
    (directory / FEATURES_FILE).write_bytes(data)
    request = make_request(parity_dir, tmp_path) | {"features_dir": str(directory)}
    with pytest.raises(IntegrityError, match=r"are damaged: features.safetensors does not match its digest"):
        train_task(request, Reporter())


def test_an_image_that_changed_is_named(parity_dir: Path, tmp_path: Path, made: tuple[Path, dict[str, Any]]) -> None:
    shutil.copytree(parity_dir / "data", tmp_path / "data")
    Image.new("RGB", (56, 56), "red").save(tmp_path / "data" / "images" / "emoji_000.png")
    request = make_request(parity_dir, tmp_path) | {"features_dir": str(made[0]), "data_dir": str(tmp_path / "data")}
    with pytest.raises(
        IntegrityError, match=r"emoji_000\.png has no cached vision features .* Materialise vision_features"
    ):
        train_task(request, Reporter())


def test_a_tower_that_trains_cannot_be_cached(
    parity_dir: Path, tmp_path: Path, made: tuple[Path, dict[str, Any]]
) -> None:
    request = make_request(parity_dir, tmp_path, finetuning_type="full", freeze_vision_tower=False)
    with pytest.raises(RecipeError, match=r"freeze_vision_tower is false, so the tower trains"):
        features_task(request, Reporter())
    with pytest.raises(RecipeError, match=r"cannot stand in for a tower that trains \(\d+ parameters"):
        train_task(request | {"features_dir": str(made[0])}, Reporter())


def test_loader_processes_read_the_cache_too(
    parity_dir: Path, tmp_path: Path, made: tuple[Path, dict[str, Any]]
) -> None:
    request = make_request(parity_dir, tmp_path, dataloader_num_workers=1, max_steps=2) | {"features_dir": str(made[0])}
    assert train_task(request, Reporter())["num_steps"] == 2
