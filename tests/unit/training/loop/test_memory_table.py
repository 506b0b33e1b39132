"""The estimate against whole steps on fake tensors of gemma-3-4b's widths, done apart, for every shape of recipe."""

import itertools
from dataclasses import replace

import pytest

from mllm_assets.training.loop import memory
from mllm_assets.training.models.device import GIB
from mllm_assets.training.models.quantization import Quantization
from tests.unit.training.loop.test_simulated_memory import NUM_SUPERVISED, NUM_TOKENS, PLAN, gemma_3_4b
from tests.whole_step import whole_step_bytes

NUM_LAYERS = 34
BITS = {"qlora 4": 4, "qlora 8": 8}
# rows of a micro-batch, activations computed twice, vision features cached, micro-batches of a step
IN_MAKE_TEST = ("projector", 4, False, True, 1)
RECIPES = ("projector", "last 2", "lora", "qlora 4", "full")
SHAPES = [
    *itertools.product(RECIPES, (1, 4, 16), (True, False), (True, False), (1,)),
    *itertools.product(("last 2", "qlora 4", "full"), (4,), (True,), (True,), (2,)),
    *itertools.product(("qlora 8",), (1, 4, 16), (False,), (True, False), (2,)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "num_rows", "checkpointed", "cached", "num_batches"),
    [shape if shape == IN_MAKE_TEST else pytest.param(*shape, marks=pytest.mark.slow) for shape in SHAPES],
)
def test_the_estimate_is_within_8_percent_of_a_whole_step(
    recipe: str, num_rows: int, checkpointed: bool, cached: bool, num_batches: int
) -> None:
    """With 8 bits each layer keeps its input, which was not counted; full fine-tuning with accumulation took 74 GiB
    where 63 were estimated.

    What a further layer takes is the same for each, so that two models of few layers tell what one of 34 takes.
    """
    bits, fewer = BITS.get(recipe), 3 if recipe == "last 2" else 2
    size = {"per_device_train_batch_size": num_rows, "gradient_accumulation_steps": num_batches}
    found: list[tuple[float, float]] = []
    for num_layers in (fewer, fewer + 1):
        setup = gemma_3_4b(
            "lora" if bits else recipe, num_layers=num_layers, **size, **({"quantization_bit": bits} if bits else {})
        )
        quantization = Quantization(bits=bits, type="nf4", double=True) if bits else None
        setup = replace(setup, checkpointed=checkpointed, precision=replace(setup.precision, quantization=quantization))
        estimated_gib = memory.estimate(setup, replace(PLAN, tower=cached)).total_gib
        held = whole_step_bytes(
            setup, num_tokens=NUM_TOKENS, num_supervised=NUM_SUPERVISED, checkpointed=checkpointed, cached=cached
        )
        found.append((estimated_gib, held / GIB))
    estimated_gib, held_gib = (
        first + (NUM_LAYERS - fewer) * (next_ - first) for first, next_ in zip(*found, strict=True)
    )
    assert estimated_gib == pytest.approx(held_gib, rel=0.08)
