"""Releases in other forms, each compared with the release by what it answers."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import pytest
from safetensors.torch import load_file, save_file

from mllm_assets.artifacts import read_manifest, write_manifest
from mllm_assets.errors import IntegrityError, MachineError, ModelError
from mllm_assets.evaluation.agreement import Agreement
from mllm_assets.recipe.asking import TurnSettings
from mllm_assets.releases import gguf, quantized
from mllm_assets.releases.copies import CONVERTER, LLAMA_CPP, CopyTask, GgufTask, QuantizeTask
from mllm_assets.training.models.load import load_model
from mllm_assets.worker.protocol import Reporter
from mllm_assets.worker.tasks import Accelerator
from tests.integration.conftest import Project

pytestmark = [pytest.mark.integration, pytest.mark.slow]
needs_int8 = pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="no extra int8")
needs_llama_cpp = pytest.mark.skipif(
    LLAMA_CPP not in os.environ or importlib.util.find_spec("xllamacpp") is None,
    reason="needs a checkout of llama.cpp, named by LLAMA_CPP, and the extra gguf",
)
LOADED = """
import sys, torch
from transformers import AutoModelForImageTextToText
model, info = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info[kind + '_keys'] for kind in ('missing', 'unexpected', 'mismatched')), info
assert not any(name.startswith('mllm_assets') for name in sys.modules)
"""


@pytest.fixture
def task(parity_dir: Path, tmp_path: Path) -> QuantizeTask:
    release = tmp_path / "releases" / "parity" / "v1"
    shutil.copytree(parity_dir / "model", release)
    write_manifest(release, {"version": "v1", "weights_digest": "4567"})
    return QuantizeTask(
        recipe_name="parity",
        release_dir=release,
        entry_name="gemma3_vlm_val",
        data_dir=parity_dir / "data",
        media_dir=None,
        turns=TurnSettings(template="gemma3"),
        asked_for=Agreement(max_samples=4, max_new_tokens=4, min_agreement=0, max_loss_distance_nats=0.002),
        directory=tmp_path / "copy",
        accelerator=Accelerator(device="cpu", num_threads=1),
    )


@needs_int8
@pytest.mark.parametrize(("weights", "most_nats", "named"), [("int8", 0.002, "packed"), ("fp8", 0.01, "scale")])
def test_a_copy_in_8_bits_loads_with_transformers_alone_and_is_compared(
    weights: Literal["int8", "fp8"], most_nats: float, named: str, task: QuantizeTask, tmp_path: Path
) -> None:
    task = replace(task, weights=weights, asked_for=replace(task.asked_for, max_loss_distance_nats=most_nats))
    found = quantized.quantize_task(task, Reporter())["comparison"]
    assert found["passed"] and found["num_other_prompts"] == 0
    assert 0 < found["loss_distance_nats"] < most_nats, "weights that are rounded give another loss"
    subprocess.run([sys.executable, "-c", LOADED, str(task.directory)], check=True, cwd=tmp_path)
    names = load_file(task.directory / "model.safetensors").keys()
    packed = [name for name in names if name.endswith(f"weight_{named}")]
    assert packed and not [name for name in packed if "vision" in name or "projector" in name or "lm_head" in name]
    assert "share of equal answers" in (task.directory / "README.md").read_text()
    assert quantized.quantize_task(task, Reporter()) == read_manifest(task.directory)
    with pytest.raises(ModelError, match="only plain ones are read"):
        load_model(task.directory)


@needs_int8
@pytest.mark.parametrize("spoilt", ["weights", "image mean"])
def test_a_copy_that_was_spoilt_does_not_answer_alike(
    spoilt: str, task: QuantizeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = quantized.write_8bit

    def spoil(source: Path, directory: Path, weights: Literal["int8", "fp8"]) -> int:
        num_layers = write(source, directory, weights)
        if spoilt == "weights":
            weights = load_file(directory / "model.safetensors")
            for name in [name for name in weights if name.endswith("weight_scale")]:
                weights[name] = weights[name] * 30
            save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        else:
            path = directory / "processor_config.json"
            settings = json.loads(path.read_text())
            settings["image_processor"]["image_mean"] = [0.0, 0.1, 0.9]
            path.write_text(json.dumps(settings))
        return num_layers

    monkeypatch.setattr(quantized, "write_8bit", spoil)
    found = quantized.quantize_task(task, Reporter())["comparison"]
    assert not found["passed"] and found["loss_distance_nats"] > task.asked_for.max_loss_distance_nats
    assert "NO" in (task.directory / "README.md").read_text()


def gguf_of(task: QuantizeTask, converter: Path) -> GgufTask:
    shared = {field.name: getattr(task, field.name) for field in fields(CopyTask)}
    return GgufTask(**shared, converter=converter, outtype="f32")


@needs_llama_cpp
@pytest.mark.parametrize("turn", ["model", "assistant"])
def test_a_copy_in_gguf_is_asked_in_llama_cpp_by_its_own_chat_template(
    turn: str, task: QuantizeTask, project: Project
) -> None:
    """Its pictures are llama.cpp's affair; of the texts every token counts."""
    shutil.rmtree(task.release_dir)
    shutil.copytree(project.root / "pretrains" / "gemma3_tiny", task.release_dir)
    write_manifest(task.release_dir, {"version": "v1", "weights_digest": "4567"})
    template = task.release_dir / "chat_template.jinja"
    template.write_text(template.read_text().replace("<start_of_turn>model", f"<start_of_turn>{turn}"))
    of_emoji = replace(task, entry_name="emoji_val", data_dir=project.layout.data)
    found = gguf.gguf_task(gguf_of(of_emoji, Path(os.environ[LLAMA_CPP]) / CONVERTER), Reporter())
    assert all(found["num_tensors"].values()) and found["comparison"]["num_samples"] == 4
    assert found["comparison"]["num_other_prompts"] == (0 if turn == "model" else 4), found["comparison"]["rows"]


@pytest.mark.parametrize(
    ("program", "error", "said"),
    [
        ("raise NotImplementedError('Model X is not supported')", ModelError, "Model X is not supported"),
        ("import no_such_package", MachineError, "No module named.*pip install"),
        ("open(sys.argv[3], 'wb').write(b'GGUF' + bytes(20))", IntegrityError, "no GGUF file with tensors"),
    ],
)
def test_a_converter_that_fails_leaves_nothing_and_is_told(
    program: str, error: type[Exception], said: str, task: QuantizeTask, tmp_path: Path
) -> None:
    converter = tmp_path / CONVERTER
    converter.write_text(f"import sys\n{program}\n")
    with pytest.raises(error, match=said):
        gguf.gguf_task(gguf_of(task, converter), Reporter())
    assert not task.directory.exists()
