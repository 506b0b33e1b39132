"""A model directory's index may name what a library would open: a pickle, or a file of somebody else's."""

import json
from pathlib import Path

import pytest

from mllm_assets.errors import ModelError
from mllm_assets.training.runs.models import model_fingerprint

pytestmark = pytest.mark.attack("model directory")

SAFE = (2).to_bytes(8, "little") + b"{}"


def model(folder: Path, index: object) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / "one.safetensors").write_bytes(SAFE)
    (folder / "model.bin").write_bytes(b"\x80\x04")
    (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({"weight_map": {"a": "model.bin"}}, "model.bin, which is not a safetensors file and may carry code"),
        ({"weight_map": {"a": "../../../etc/passwd"}}, "not a plain path below its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not a plain path below its folder"),
        ({"weight_map": {"a": 3}}, "not a plain path below its folder"),
        ({"weight_map": {"a": "two.safetensors"}}, "two.safetensors, which does not exist"),
        ({"weight_map": 3}, "is not an index of weights"),
        ({}, "is not an index of weights"),
        ("[]", "is not an index of weights"),
        ("not JSON", "is not an index of weights"),
    ],
)
def test_an_index_names_safetensors_of_its_directory_alone(tmp_path: Path, index: object, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        model_fingerprint(model(tmp_path, index))


def test_a_pickle_under_the_name_of_safetensors_is_refused(tmp_path: Path) -> None:
    directory = model(tmp_path, {"weight_map": {"a": "one.safetensors"}})
    assert model_fingerprint(directory)
    (directory / "one.safetensors").write_bytes(b"\x80\x04pickle, more of it")
    with pytest.raises(ModelError, match=r"one.safetensors, which is not a safetensors file"):
        model_fingerprint(directory)
