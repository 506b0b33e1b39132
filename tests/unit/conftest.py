"""A project that training can be planned in."""

import shutil
from pathlib import Path

import pytest

from mllm_assets.recipe.load import Recipe, load_recipe

RECIPE = """
model_name_or_path: pretrains/tiny
dataset: gemma3_vlm_train
eval_dataset: gemma3_vlm_val
template: gemma3
do_train: true
output_dir: outputs/r
"""


@pytest.fixture
def project(tmp_path: Path, parity_dir: Path) -> Path:
    """A root with a model directory (its config only), the parity data, and `configs/r.yaml`."""
    (tmp_path / "pretrains" / "tiny").mkdir(parents=True)
    (tmp_path / "pretrains" / "tiny" / "config.json").write_text("{}")
    (tmp_path / "pretrains" / "tiny" / "model.safetensors").write_bytes(b"weights")
    shutil.copytree(parity_dir / "data", tmp_path / "data")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "r.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def recipe(project: Path) -> Recipe:
    return load_recipe(project / "configs" / "r.yaml")
