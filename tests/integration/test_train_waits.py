"""How often a training step makes the host wait for the device: counted on the CPU, where the same operations run."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.loop.engine import train_task
from mllm_assets.training.loop.trainer import FineTuner
from mllm_assets.worker.protocol import Reporter
from tests.fake_cuda import Peak
from tests.worker_tasks import training

pytestmark = pytest.mark.integration


RECORDED = Path(__file__).parents[1] / "golden" / "parity" / "reference"


def recorded(stage: str) -> dict[str, Any]:
    """The entry and the stage of a recorded recipe."""
    config = json.loads((RECORDED / f"{stage}_lora.json").read_text())["config"]
    return {"stage": stage, "dataset": config["dataset"], "finetuning_type": "lora", "lora_rank": 4}


@pytest.mark.parametrize("values", [
    {"finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False},
    pytest.param({"finetuning_type": "lora", "lora_rank": 4}, marks=pytest.mark.slow),
    recorded("dpo"),
    recorded("kto"),
], ids=["projector", "lora", "dpo", "kto"])  # fmt: skip
def test_a_step_waits_for_the_device_once_however_many_micro_batches_it_has(
    parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    """It was four times a micro-batch and twice a step: masks, counts of tokens, losses, the norm.

    A batch that is evaluated made it wait twice.
    """
    # as for a GPU: on the CPU, where reading a mask waits for nothing, it selects the logits
    never = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(Collator, "selects_by_mask", never, raising=False)
    waits: dict[str, list[int]] = defaultdict(list)
    tolist, item, as_float = torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__float__

    def counted(name: str) -> None:
        plain = getattr(FineTuner, name)

        def run(self: Any, *args: Any, **options: Any) -> Any:
            read = 0

            def reads(real: Any) -> Any:
                def call(tensor: torch.Tensor) -> Any:
                    nonlocal read
                    read += 1
                    return real(tensor)

                return call

            with monkeypatch.context() as patch, Peak("cpu") as counter:
                # each of these reads a value; `tolist` of a CPU tensor dispatches nothing
                for method, real in (("tolist", tolist), ("item", item), ("__float__", as_float)):
                    patch.setattr(torch.Tensor, method, reads(real))
                made = plain(self, *args, **options)
            waits[name].append(max(read, counter.waits.total()))
            return made

        monkeypatch.setattr(FineTuner, name, run)

    for name in ("training_step", "_get_grad_norm", "prediction_step"):
        counted(name)
    spec = TrainSpec(**{
        "model_name_or_path": "model", "dataset": "gemma3_vlm_train", "template": "gemma3", "do_train": True,
        "learning_rate": 1e-3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 2,
        "logging_steps": 1, "max_samples": 10, "val_size": 0.2, "eval_strategy": "steps", "eval_steps": 2, **values,
    })  # fmt: skip
    task = training(spec, model_dir=parity_dir / "model", data_dir=parity_dir / "data", run_dir=tmp_path / "run")
    train_task(task, Reporter())
    assert len(waits["training_step"]) > 2 and sum(waits["training_step"]) == 0
    assert waits["_get_grad_norm"] == [1, 1]
    assert waits["prediction_step"] and sum(waits["prediction_step"]) == 0
