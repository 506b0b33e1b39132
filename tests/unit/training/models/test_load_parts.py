"""Modules that are read without the rest of their model are those that the whole model has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_assets.training.caches import tower
from mllm_assets.training.models import load_parts
from mllm_assets.training.models.load import load_model
from tests import tiny_families
from tests.google_layout import google_names


def tensors_of(module: Any) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same_modules(directory: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, *, whole: int) -> None:
    reads = []
    monkeypatch.setattr(load_parts, "load_model", lambda directory: reads.append(directory) or load_model(directory))
    model = load_model(directory)
    paths = tower.paths(model)
    for path, module in load_parts.load_modules(directory, paths, dtype).items():
        expected = tensors_of(model.get_submodule(path).to(dtype))
        found = tensors_of(module)
        assert found.keys() == expected.keys() and found
        assert all(found[name].equal(expected[name]) for name in found)
        assert not module.training and {tensor.requires_grad for tensor in found.values()} == {False}
    assert len(reads) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gemmas_tower_is_read_alone_under_present_and_googles_names(
    parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """All of the base was read again for it, and was in main memory beside the trained model: 8.6 GB for 0.8."""
    assert_same_modules(parity_dir / "model", dtype, monkeypatch, whole=0)
    for path in (parity_dir / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    save_file(google_names(load_file(weights)), weights, {"format": "pt"})
    assert_same_modules(tmp_path, dtype, monkeypatch, whole=0)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "llava", "smolvlm", "paligemma", "gemma4"])
def test_what_other_families_cache_is_read_alone_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    assert_same_modules(tiny_families.build(model_type, tmp_path / "model"), torch.float32, monkeypatch, whole=0)


def test_the_whole_model_is_read_where_a_tensor_is_not_under_a_known_name(
    parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(parity_dir / "model")
    monkeypatch.setattr(load_parts, "weight_map", lambda directory: {})
    paths = tower.paths(model)
    found = load_parts.load_modules(parity_dir / "model", paths, torch.float32)
    for path in paths:
        expected = tensors_of(model.get_submodule(path))
        assert all(tensor.equal(expected[name]) for name, tensor in tensors_of(found[path]).items())
