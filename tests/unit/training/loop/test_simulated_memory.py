"""What a run takes on a GPU, from a whole step of gemma-3-4b's shape on fake tensors, and what follows from it."""

import importlib.metadata
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_assets.errors import MachineError
from mllm_assets.file_digests import FileDigests
from mllm_assets.training.caches.prepare import CachePlan, Setup, plan_caches
from mllm_assets.training.encoding.encoded_rows import EncodedRows
from mllm_assets.training.encoding.inputs import Inputs
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.loop import memory, simulation
from mllm_assets.training.loop.fitting import decide_checkpointing, note_on_answers, what_fits
from mllm_assets.training.models import freezing
from mllm_assets.training.models.device import Device, Precision
from mllm_assets.worker.tasks import CacheSettings
from tests.fake_cuda import meta_model
from tests.unit.training.loop.test_fake_cuda import RECIPES, make_spec

IMAGE_TOKEN, NUM_TOKENS, NUM_SUPERVISED = 7, 304, 22
PLAN = CachePlan(tower=True, boundary=None, facts={})
slow = pytest.mark.slow


def card(free_gib: float) -> Device:
    return Device(kind="cuda", name="a card", driver="", memory_gib=80.0, free_gib=free_gib)


def gemma_3_4b(recipe: str, *, free_gib: float = 80.0, num_layers: int = 34, **values: Any) -> Setup:
    """A run of gemma-3-4b in bf16, rows with one image each; on `meta`, so nothing is allocated.

    With fewer layers than it has, its tower has one.
    """
    spec = make_spec(bf16=True, **RECIPES[recipe], **values)
    labels = array("i", [-100] * (NUM_TOKENS - NUM_SUPERVISED) + [1] * NUM_SUPERVISED)
    ids = array("i", [IMAGE_TOKEN] * 256 + [1] * (NUM_TOKENS - 256))
    row = EncodedRow(id="a", input_ids=ids, labels=labels, images=(Path("a.png"),))
    return Setup(
        spec=spec,
        model_dir=Path("m"),
        inputs=Inputs(
            processor=None,
            train_rows=EncodedRows.of([row], IMAGE_TOKEN),
            eval_rows=EncodedRows.of([]),
            digests=FileDigests(),
        ),
        device=card(free_gib),
        precision=Precision(weights=torch.bfloat16, autocast="bf16"),
        shape=freezing.apply(spec, meta_model(layers=num_layers, vision_layers=27 if num_layers == 34 else 1)),
        caches=CacheSettings(),
    )


def test_a_step_is_simulated_once_for_all_processes_and_recipes_of_one_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA's took seconds for each process that asked: the look at a recipe, the worker, each trial of a sweep."""
    ran: list[int] = []
    run = simulation._run

    def counted(setup: Setup, *args: Any, **options: Any) -> simulation.SimulatedStep:
        ran.append(setup.spec.per_device_train_batch_size)
        return run(setup, *args, **options)

    monkeypatch.setattr(simulation, "_run", counted)

    def estimate_of(recipe: str = "lora", **values: Any) -> memory.MemoryEstimate:
        monkeypatch.setattr(simulation, "_KNOWN", {})  # as in a new process
        setup = gemma_3_4b(recipe, num_layers=1, **values)
        return memory.estimate(replace(setup, caches=CacheSettings(estimates_root=tmp_path)), PLAN)

    first = estimate_of()
    assert estimate_of() == estimate_of(learning_rate=0.5) == first and len(ran) == 1
    assert estimate_of("projector") != first and estimate_of(per_device_train_batch_size=2) != first
    assert len(ran) == 3
    for path in tmp_path.iterdir():
        path.write_text('{"weights": 1}')
    assert estimate_of() == first and len(ran) == 4, "a damaged one counts as not there"


# GiB of a whole step, counted apart from this code with other tools (a tracker over `FakeTensorMode`), PEFT's copies
# of LoRA's inputs left out
@pytest.mark.parametrize(("recipe", "num_rows", "checkpointed", "expected_gib"), [
    ("projector", 4, False, 12.43),
    pytest.param("projector", 4, True, 7.70, marks=slow),
    pytest.param("last 2", 4, True, 10.15, marks=slow),
    pytest.param("lora", 4, True, 8.24, marks=slow),
    pytest.param("full", 4, True, 62.9, marks=slow),
])  # fmt: skip
def test_the_estimate_is_that_of_a_whole_step(
    recipe: str, num_rows: int, checkpointed: bool, expected_gib: float
) -> None:
    setup = replace(gemma_3_4b(recipe, per_device_train_batch_size=num_rows), checkpointed=checkpointed)
    assert memory.estimate(setup, PLAN).total_gib == pytest.approx(expected_gib, rel=0.08)


@slow
def test_lora_keeps_no_float32_copy_of_what_enters_each_layer() -> None:
    """18.61 GiB with PEFT's copies, under an autocast that rounds them again; dropout's masks stay."""
    setup = replace(gemma_3_4b("lora", per_device_train_batch_size=4), checkpointed=False)
    assert memory.estimate(setup, PLAN).total_gib < 0.9 * 18.61


@pytest.mark.parametrize(("free_gib", "checkpointed"), [(80.0, False), (10.0, True)])
def test_activations_are_computed_twice_only_where_once_does_not_fit_and_for_the_life_of_a_run(
    tmp_path: Path, free_gib: float, checkpointed: bool
) -> None:
    setup = gemma_3_4b("projector", free_gib=free_gib, per_device_train_batch_size=4)
    (tmp_path / "run.json").write_text("{}")
    assert decide_checkpointing(setup, PLAN, tmp_path).checkpointed is checkpointed
    for now_free_gib in (10.0, 80.0):
        again = decide_checkpointing(replace(setup, device=card(now_free_gib)), PLAN, tmp_path)
        assert again.checkpointed is checkpointed
    key = gemma_3_4b("projector", free_gib=free_gib, per_device_train_batch_size=4, disable_gradient_checkpointing=True)
    assert not memory.needs_checkpointing(key, PLAN)


def test_what_other_programs_hold_is_said_in_the_refusal() -> None:
    """The total was compared: a run on a card that another program filled was started, and ended out of memory."""
    setup = replace(gemma_3_4b("projector", free_gib=5.0, per_device_train_batch_size=4), checkpointed=True)
    with pytest.raises(MachineError, match=r"workspaces and fragmentation 1\.\d.*has 5\.0 GiB of 80\.0 GiB free\. End"):
        memory.require_memory(memory.estimate(setup, PLAN), setup.device, lambda: None)


def test_a_model_that_is_loaded_again_to_be_published_is_merged_on_the_card_that_has_room_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was quantised or rounded was merged, saved and reloaded in main memory, with a GPU idle beside it."""
    setup = gemma_3_4b("lora")
    free = {"gib": 12.0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free["gib"] * 2**30), 80 * 2**30))
    assert memory.publishing_device(setup, torch.bfloat16, num_rows=2) == "cuda:0"
    assert memory.publishing_device(setup, torch.float32, num_rows=2) == "cpu", "16 GiB of weights"
    free["gib"] = 9.0
    assert memory.publishing_device(setup, torch.bfloat16, num_rows=2) == "cpu"
    on_a_cpu = replace(setup, device=replace(setup.device, kind="cpu"))
    assert memory.publishing_device(on_a_cpu, torch.bfloat16, num_rows=2) == "cpu"


def test_a_run_says_at_its_start_that_the_card_is_too_small_to_ask_its_model() -> None:
    """LoRA on 4 bits trains gemma-3-4b on 8 GB, and hours later its predictions ended out of memory."""
    note = note_on_answers(gemma_3_4b("lora", free_gib=7.5), torch.bfloat16)
    assert note and "will take 9.1 GiB to be asked, and a card has 7.5 GiB free" in note
    assert note_on_answers(gemma_3_4b("lora", free_gib=12.0), torch.bfloat16) is None


ROWS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(("recipe", "free_gib", "values", "expected"), [
    ("lora", 3.9, ROWS | {"disable_gradient_checkpointing": True}, "With disable_gradient_checkpointing: false it"),
    ("projector", 3.2, ROWS, "With per_device_train_batch_size: 1, gradient_accumulation_steps: 8 it would need 3"),
    ("full", 3.2, ROWS, "With finetuning_type: lora, per_device_train_batch_size: 1, gradient_accumulation_steps: 8"),
    ("lora", 2.8, ROWS, "With quantization_bit: 4, per_device_train_batch_size: 1, gradient_accumulation_steps: 8 it"),
    ("lora", 1.5, ROWS, None),
])  # fmt: skip
def test_a_refusal_names_the_mildest_change_of_the_recipe_that_fits(
    recipe: str, free_gib: float, values: dict[str, Any], expected: str | None
) -> None:
    """`Set bf16: true` was the cure of a run in bf16, and halving that of micro-batches of 1."""
    setup = gemma_3_4b(recipe, free_gib=free_gib, num_layers=4, **values)
    setup = replace(setup, checkpointed=not setup.spec.disable_gradient_checkpointing)
    assert not memory.estimate(setup, plan_caches(setup)).fits(setup.device)
    found = what_fits(setup)
    assert found == expected or str(found).startswith(str(expected)), found


def test_what_would_fit_is_said_where_bitsandbytes_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal ended in a traceback about a package that the recipe does not need."""
    found = importlib.metadata.distribution

    def without(name: str) -> importlib.metadata.Distribution:
        if name == "bitsandbytes":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "distribution", without)
    setup = gemma_3_4b("lora", free_gib=2.8, num_layers=4, **ROWS)
    said = what_fits(replace(setup, checkpointed=True))
    assert said and said.startswith("With quantization_bit: 4, per_device_train_batch_size: 1"), said
