"""A model directory that holds code, or pickles: neither is ever run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm_assets.errors import ModelError
from mllm_assets.training.models.adapters import read_config
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


def changed(model_dir: Path, part: str | None, **values: object) -> str:
    """The text of a `config.json` with other values."""
    config = json.loads((model_dir / "config.json").read_text())
    (config if part is None else config[part]).update(values)
    return json.dumps(config)


@pytest.mark.parametrize(
    ("part", "values", "said"),
    [
        (None, "[]", "expected an object, found list"),
        (None, "[" * 100_000, "is not JSON"),
        (None, {"text_config": []}, "does not describe a model"),
        (None, {"dtype": "os.system"}, "does not describe a model"),
        (None, {"text_config": None}, r"describes a model of [\d,]+ parameters, and its weights have"),
        ("text_config", {"num_attention_heads": 0}, "does not describe a model"),
        ("text_config", {"rope_parameters": 3}, "does not describe a model"),
        ("text_config", {"hidden_activation": "x"}, "cannot be loaded .KeyError"),
        ("text_config", {"vocab_size": 10**13}, "vocab_size is 10000000000000, which no model has"),
        ("vision_config", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, which no model has"),
        ("vision_config", {"patch_size": 0}, "cannot be loaded .ZeroDivisionError"),
    ],
    ids=str,
)
def test_a_configuration_of_no_model_is_a_sentence(
    model_dir: Path, part: str | None, values: object, said: str
) -> None:
    """Each ended in a library's traceback; one made a thousand million layers, one of another size took 40 s first."""
    text = values if isinstance(values, str) else changed(model_dir, part, **values)
    (model_dir / "config.json").write_text(text)
    with pytest.raises(ModelError, match=said):
        load_model(model_dir)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["lm_head", "norm", "patch_embedding"])
def test_weights_that_are_no_numbers_are_named(model_dir: Path, name: str, value: float) -> None:
    """One damaged value in a base trained until the first step's NaN, which said nothing of the file."""
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    key = next((key for key in tensors if name in key), next(iter(tensors)))
    tensors[key].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"hold NaN or infinity: \S+ \(torch\.float32\), so that"):
        load_model(model_dir)


def test_weights_that_a_narrow_type_cannot_hold_are_named(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    load_model(model_dir)
    with pytest.raises(ModelError, match=r"\(torch\.float16\).* may need bf16 or float32"):
        load_model(model_dir, dtype=torch.float16)


@pytest.mark.parametrize("method", ["bitnet-of-nobody", "gptq", 3, None])
@pytest.mark.parametrize("part", [None, "text_config"])
def test_weights_that_were_stored_quantised_are_refused(model_dir: Path, part: str | None, method: object) -> None:
    """A method that the library does not know was passed by, and the weights were loaded as if they were plain."""
    settings = {"quant_method": method} if method is not None else {"bits": 2}
    (model_dir / "config.json").write_text(changed(model_dir, part, quantization_config=settings))
    with pytest.raises(ModelError, match=r"config\.json: quantization_config says .* Download the model that it was"):
        load_model(model_dir)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_weights_that_were_cut_are_a_sentence(model_dir: Path, share: float) -> None:
    """A download that broke ended in safetensors' own error."""
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ModelError, match=r"The weights in \S+ cannot be loaded"):
        load_model(model_dir)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
def test_a_processor_that_is_none_is_a_sentence(model_dir: Path, name: str) -> None:
    for content in ("null", "3", "[" * 100_000, None):
        (model_dir / name).unlink() if content is None else (model_dir / name).write_text(content)
        with pytest.raises(ModelError, match="has no usable processor"):
            load_processor(model_dir)


@pytest.mark.parametrize(
    "values",
    [[], {"r": "x"}, {"r": 10**9}, {"r": 4, "rank_pattern": {"q_proj": 10**9}}, {"eva_config": 3}, "[" * 100_000],
    ids=lambda values: str(values)[:24],
)
def test_an_adapter_has_the_rank_of_its_weights(tmp_path: Path, values: Any) -> None:
    save_file({"base.q_proj.lora_A.weight": torch.zeros(4, 16)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(config))
    assert read_config(tmp_path).r == 4
    path.write_text(values if isinstance(values, str) else json.dumps({**config, **values} if values else values))
    with pytest.raises(ModelError, match="adapter_config.json"):
        read_config(tmp_path)
