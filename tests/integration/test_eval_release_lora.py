"""A release of a LoRA run: the adapter and the merged model are one, and LLaMA-Factory's keys name both."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mllm_assets.artifacts import read_manifest, write_manifest
from mllm_assets.errors import IntegrityError
from mllm_assets.releases import reload_check
from mllm_assets.releases.check import verify
from mllm_assets.training.models.load import load_model, load_processor
from mllm_assets.training.models.publishing import publish_model
from mllm_assets.worker.protocol import Reporter
from tests.integration.test_eval_release import RUN, released, task_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]
GOLDEN = Path(__file__).parents[1] / "golden"
BASE = GOLDEN / "parity" / "model"


@pytest.fixture
def lora_run(tmp_path: Path) -> Path:
    """A run whose adapter changes the model, saved as training saves it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|down_proj)", init_lora_weights=False)
    model = get_peft_model(load_model(BASE), config)
    run_dir = tmp_path / "outputs" / "parity" / "0123"
    run_dir.mkdir(parents=True)
    batch = reload_check.fixed_batch(str(BASE))
    reload = publish_model(model, load_processor(BASE), run_dir, BASE, batch)
    write_manifest(run_dir, {**RUN, "reload": reload})
    return run_dir


def test_the_adapter_on_its_base_model_gives_the_merged_models_logits(lora_run: Path, tmp_path: Path) -> None:
    release = released(lora_run, tmp_path)
    verification = read_manifest(release.directory)["verification"]
    assert 0 <= verification["adapter_max_logit_difference"] <= 1e-5
    base, _ = reload_check.loss_and_logits(load_model(BASE), reload_check.fixed_batch(str(BASE)))
    assert abs(verification["loss"] - base) > 1e-3, "the adapter does something"
    config = json.loads((release.directory / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "parity", "no folder of this machine"
    assert str(tmp_path) not in (release.directory / "README.md").read_text()

    known = json.loads((GOLDEN / "llamafactory_keys.json").read_text()).keys()
    merged = yaml.safe_load((release.directory / "llamafactory_inference.yaml").read_text())
    adapter = yaml.safe_load((release.directory / "llamafactory_adapter.yaml").read_text())
    assert merged.keys() | adapter.keys() <= known
    assert tmp_path / merged["model_name_or_path"] == release.directory and merged["template"] == "gemma3"
    assert (tmp_path / adapter["adapter_name_or_path"] / "adapter_config.json").is_file()
    assert (adapter["model_name_or_path"], adapter["finetuning_type"]) == ("parity", "lora")


def test_an_adapter_of_another_base_model_is_found(lora_run: Path, tmp_path: Path) -> None:
    release = released(lora_run, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("mm_input_projection_weight"))
    save_file({**weights, name: weights[name] * 1.5}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="on its base model and the merged model give logits up to .* apart"):
        verify(task_for(release.directory, lora_run, other), Reporter())
