"""QLoRA on a real quantised base: its loss is PEFT's, a kill changes nothing, and what is published is unquantised."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, set_seed

from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.training.encoding.inputs import make_collator, read_inputs
from mllm_assets.training.loop.checkpoints import load_checkpoint
from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.models.freezing import lora_targets
from mllm_assets.training.models.load import load_config, load_model, model_on_meta
from mllm_assets.training.models.quantization import quantized_weights
from mllm_assets.worker.protocol import Reporter
from tests.interruption import CASES, KilledRun, losses, make_task

functional = pytest.importorskip("bitsandbytes.functional", reason="the extra gpu is not installed")

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

PLAIN = {
    "lora_dropout": 0.0, "gradient_accumulation_steps": 1, "disable_shuffling": True, "warmup_ratio": 0.0,
    "lr_scheduler_type": "constant", "eval_strategy": "no", "max_steps": 3, "save_steps": 3,
}  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
def test_the_losses_are_those_of_transformers_and_peft_alone(bits: int, parity_dir: Path, tmp_path: Path) -> None:
    task = make_task(parity_dir, tmp_path / "run", quantization_bit=bits, **PLAIN)
    train_task(task, Reporter())
    spec = task.recipe
    inputs = read_inputs(spec, parity_dir / "model", Dataset(parity_dir / "data"), tmp_path / "rows", Reporter())
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )

    set_seed(spec.seed)
    base = AutoModelForImageTextToText.from_pretrained(
        parity_dir / "model", dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    kinds = {name.split(".")[-1]: type(module).__name__ for name, module in base.named_modules()}
    assert kinds["q_proj"] == ("Linear4bit" if bits == 4 else "Linear8bitLt")
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=lora_targets(spec, base)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=0.0)
    expected = []
    for step in range(3):
        batch = make_collator(spec, inputs.processor)(inputs.train_rows[2 * step : 2 * step + 2])
        loss = model.train()(**batch, use_cache=False).loss
        expected.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, spec.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    assert list(losses(tmp_path / "run").values()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_killed_and_resumed_it_ends_with_the_same_bits_on_cached_features(
    bits: int, parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, "quantized", {"quantization_bit": bits})
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    run = KilledRun("quantized", parity_dir, tmp_path, num_steps=30)
    assert run.whole["caches"]["vision_features"] == "cached"
    by_step = losses(run.whole_dir)
    assert sum(by_step[step] for step in (28, 29, 30)) < sum(by_step[step] for step in (1, 2, 3)) - 0.3
    for kind in ("step", "save"):
        kill = run.kill(kind, rng)
        assert kill.is_exact, (seed, kill)
    for what, is_same in run.finish():
        assert is_same, (seed, what)


def test_a_run_quantises_each_layer_once(parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With cached features and with what is published at its end."""
    shapes: list[torch.Size] = []
    quantize_4bit = functional.quantize_4bit

    def counting(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(weight.shape)
        return quantize_4bit(weight, *args, **kwargs)

    monkeypatch.setattr(functional, "quantize_4bit", counting)
    values = {**PLAIN, "max_samples": 4, "quantization_bit": 4}
    task = make_task(parity_dir, tmp_path / "run", cache_dir=tmp_path / "cache", **values)
    assert train_task(task, Reporter())["caches"]["vision_features"] == "cached"
    on_meta = model_on_meta(load_config(parity_dir / "model"))
    on_meta.requires_grad_(False)
    assert len(shapes) == len(quantized_weights(on_meta)) > 20


def test_evaluating_between_the_steps_changes_nothing(parity_dir: Path, tmp_path: Path) -> None:
    """bitsandbytes packs the weights of a model that is evaluated, on some CPUs, and then gives no gradient."""
    for name, overrides in {"with": {"eval_strategy": "steps", "eval_steps": 1}, "without": {}}.items():
        task = make_task(parity_dir, tmp_path / name, quantization_bit=4, **{**PLAIN, **overrides})
        train_task(task, Reporter())
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_the_command_publishes_the_adapter_merged_into_the_unquantised_base(parity_dir: Path, tmp_path: Path) -> None:
    recipe = {
        "model_name_or_path": str(parity_dir / "model"), "dataset_dir": str(parity_dir / "data"), "stage": "sft",
        "dataset": "gemma3_vlm_train", "template": "gemma3", "do_train": True, "finetuning_type": "lora",
        "quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False, "bf16": True,
        "learning_rate": 1e-2, "max_steps": 2, "save_steps": 2, "output_dir": "outputs/q",
    }  # fmt: skip
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "q.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "mllm_assets.cli", "train", "configs/q.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels" not in done.stdout + done.stderr
    run_dir = (tmp_path / "outputs" / "q" / "latest").resolve()
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["quantization"].startswith("4-bit fp4, bitsandbytes ")
    assert any("the adapter is merged into the unquantised base" in text for text in manifest["warnings"])

    assert all("lora_" in name for name in load_file(run_dir / "checkpoint-2" / "trainable.safetensors"))
    assert "quantization_config" not in json.loads((run_dir / "model" / "config.json").read_text())
    published = load_model(run_dir / "model").state_dict()
    base = load_model(parity_dir / "model")
    merged = PeftModel.from_pretrained(base, run_dir / "adapter").merge_and_unload().state_dict()
    from_checkpoint = load_checkpoint(run_dir / "checkpoint-2").state_dict()
    changed = load_model(parity_dir / "model").state_dict()
    assert any(not torch.equal(published[name], changed[name]) for name in published if "q_proj" in name)
    for name, tensor in published.items():
        assert torch.equal(tensor, from_checkpoint[name]), name
        assert torch.equal(tensor, merged[name].to(tensor.dtype)), name
