"""The estimate against two whole steps on fake tensors of gemma-3-4b's widths, done apart."""

from dataclasses import replace
from typing import Any

import pytest

from mllm_assets.training.loop import memory
from mllm_assets.training.models import freezing
from mllm_assets.training.models.device import GIB
from mllm_assets.training.models.quantization import Quantization
from tests.fake_cuda import meta_model
from tests.unit.training.loop.test_simulated_memory import NUM_SUPERVISED, NUM_TOKENS, PLAN, gemma_3_4b
from tests.whole_step import whole_step_bytes

LAYERS = {"layers": 3, "vision_layers": 1}  # what a layer takes is the same in all of them
BITS = {"qlora 4": 4, "qlora 8": 8}


# rows of a micro-batch, activations computed twice, vision features cached, micro-batches of a step
@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "num_rows", "checkpointed", "cached", "num_batches"), [
    ("projector", 1, True, True, 1),
    ("projector", 4, False, True, 1),
    ("qlora 4", 1, True, True, 1),
    ("qlora 4", 4, False, True, 1),
    ("qlora 4", 16, False, False, 2),
    ("qlora 8", 1, True, True, 1),
    ("qlora 8", 4, False, True, 1),
    ("qlora 8", 16, False, False, 2),
])  # fmt: skip
def test_the_estimate_is_within_8_percent_of_two_whole_steps(
    recipe: str, num_rows: int, checkpointed: bool, cached: bool, num_batches: int
) -> None:
    """With 8 bits each layer keeps its input, which was not counted."""
    size = {"per_device_train_batch_size": num_rows, "gradient_accumulation_steps": num_batches}
    bits = BITS.get(recipe)
    setup = gemma_3_4b("lora" if bits else recipe, **size, **({"quantization_bit": bits} if bits else {}))
    quantization = Quantization(bits=bits, type="nf4", double=True) if bits else None
    setup = replace(
        setup,
        checkpointed=checkpointed,
        shape=freezing.apply(setup.spec, meta_model(**LAYERS)),
        precision=replace(setup.precision, quantization=quantization),
    )
    sizes: Any = {"num_tokens": NUM_TOKENS, "num_supervised": NUM_SUPERVISED, "layers": LAYERS}
    held_gib = whole_step_bytes(setup, checkpointed=checkpointed, cached=cached, **sizes) / GIB
    assert memory.estimate(setup, replace(PLAN, tower=cached)).total_gib == pytest.approx(held_gib, rel=0.08)
