"""A model directory that holds code, or pickles: neither is ever run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mllm_assets.errors import ModelError
from mllm_assets.training.models.load import load_config, load_model, load_processor

pytestmark = pytest.mark.attack("model directory")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def model_dir(parity_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parity_dir / "model", tmp_path / "model"))


def test_code_in_a_model_directory_is_not_run(model_dir: Path, tmp_path: Path) -> None:
    """`auto_map` names classes in files of the directory; with trust_remote_code the library imports them."""
    (model_dir / "poison.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name, kind in (
        ("config.json", "AutoConfig"),
        ("config.json", "AutoModelForImageTextToText"),
        ("processor_config.json", "AutoProcessor"),
        ("tokenizer_config.json", "AutoTokenizer"),
    ):
        values = json.loads((model_dir / name).read_text())
        named = "poison.Poison" if kind != "AutoTokenizer" else ["poison.Poison", None]
        values["auto_map"] = {**values.get("auto_map", {}), kind: named}
        (model_dir / name).write_text(json.dumps(values))
    load_model(model_dir)
    load_processor(model_dir)
    assert not (tmp_path / "ran").exists()
    config = json.loads((model_dir / "config.json").read_text()) | {"model_type": "poison"}
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="holds a model of type 'poison': expected one of"):
        load_config(model_dir)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_pickles_are_refused_with_the_way_out(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    torch.save({"weight": Bomb(tmp_path / "ran")}, model_dir / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, which can run code .* Where you trust it"):
        load_model(model_dir)
    assert not (tmp_path / "ran").exists()
