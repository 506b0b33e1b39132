"""How often a training step makes the host wait for the device: counted on the CPU, where the same operations run."""

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


@pytest.mark.parametrize("values", [
    {"finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False},
    pytest.param({"finetuning_type": "lora", "lora_rank": 4}, marks=pytest.mark.slow),
], ids=["projector", "lora"])  # fmt: skip
def test_a_step_waits_for_the_device_once_however_many_micro_batches_it_has(
    parity_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    """It was four times a micro-batch and twice a step: masks, counts of tokens, losses, the norm."""
    # as for a GPU: on the CPU, where reading a mask waits for nothing, it selects the logits
    never = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(Collator, "selects_by_mask", never, raising=False)
    waits: list[int] = []
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
            waits.append(max(read, counter.waits.total()))
            return made

        monkeypatch.setattr(FineTuner, name, run)

    counted("training_step")
    counted("_get_grad_norm")
    spec = TrainSpec(
        model_name_or_path="model", dataset="gemma3_vlm_train", template="gemma3", do_train=True, learning_rate=1e-3,
        per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=2, logging_steps=1, **values,
    )  # fmt: skip
    task = training(spec, model_dir=parity_dir / "model", data_dir=parity_dir / "data", run_dir=tmp_path / "run")
    train_task(task, Reporter())
    assert len(waits) == 2 * (3 + 1)
    assert [sum(waits[start : start + 4]) for start in (0, 4)] == [1, 1]
