"""A published model whose bytes changed is noticed by whoever starts from it, and is written again without training."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mllm_assets.errors import IntegrityError
from mllm_assets.training.loop.checkpoints import load_checkpoint
from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.models import freezing
from mllm_assets.training.models.load import load_model
from mllm_assets.training.runs.models import find_run_damage, model_fingerprint, reopen_run, starting_fingerprint
from mllm_assets.worker.protocol import Reporter
from tests.interruption import make_task

pytestmark = pytest.mark.integration


def test_a_flipped_bit_is_refused_by_the_next_run_and_mended_as_the_message_says(
    parity_dir: Path, tmp_path: Path
) -> None:
    """One bit of the weights: nothing fails to load, and the next stage trains on something else."""
    first, second = tmp_path / "first", tmp_path / "second"
    task = make_task(parity_dir, first, max_steps=2, save_steps=1, eval_strategy="no")
    trained = train_task(task, Reporter())
    weights = first / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    start = {"model_dir": first / "model", "pretrained_fingerprint": model_fingerprint(first / "model")}
    with pytest.raises(IntegrityError, match=r"first/model/model.safetensors does not match its digest"):
        train_task(replace(make_task(parity_dir, second, max_steps=1), **start), Reporter())
    assert not (second / "model").exists()
    assert find_run_damage(first) == "model/model.safetensors does not match its digest"

    reopen_run(first)
    again = train_task(task, Reporter())
    assert find_run_damage(first) is None
    assert (again["resumed_from_step"], again["weights_digest"]) == (2, trained["weights_digest"])
    assert weights.read_bytes() == whole


@pytest.mark.slow
def test_a_run_on_adapters_publishes_and_reloads_what_it_trained(parity_dir: Path, tmp_path: Path) -> None:
    """The first is merged and the second trains on; a checkpoint holds neither the one nor the base."""
    common = {"lora_rank": 2, "lora_dropout": 0.0, "max_steps": 1, "save_steps": 1, "eval_strategy": "no"}
    adapters = tuple(tmp_path / name for name in ("a", "b"))
    for folder, target in zip(adapters, ("q_proj", "up_proj"), strict=True):
        spec = make_task(parity_dir, folder, lora_target=target, **common).recipe
        freezing.apply(spec, load_model(parity_dir / "model")).model.save_pretrained(folder)
    task = make_task(parity_dir, tmp_path / "run", adapter_name_or_path="a,b", **common)
    fingerprint = starting_fingerprint(task.model_dir, adapters)
    task = replace(task, adapters=adapters, pretrained_fingerprint=fingerprint)
    whole = train_task(task, Reporter())
    assert not (tmp_path / "run" / "adapter").exists()
    assert {row["module"].split(".")[0] for row in whole["trainable"]} == {"language_model"}
    published = load_file(tmp_path / "run" / "model" / "model.safetensors")
    at_step = load_checkpoint(tmp_path / "run" / "checkpoint-1").state_dict()
    found = {name: tensor for name, tensor in at_step.items() if "q_proj" in name or "up_proj" in name}
    same = {tensor.sum().item() for name, tensor in published.items() if "q_proj" in name or "up_proj" in name}
    assert {tensor.sum().item() for tensor in found.values()} == same
