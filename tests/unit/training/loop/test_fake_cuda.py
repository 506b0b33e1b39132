"""What a step computes on CUDA, without CUDA: devices and dtypes of a whole forward and backward pass."""

from typing import Any

import pytest
import torch

from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches import tower
from mllm_assets.training.loop import loss, preference_tuner, preferences, simulation
from mllm_assets.training.loop.checkpoints import load_trainable
from mllm_assets.training.loop.packed_rows import gemma3_masks
from mllm_assets.training.models import freezing
from mllm_assets.training.models.device import Precision
from mllm_assets.training.models.load import base_model, cast_weights, without_waiting_checks
from tests.fake_cuda import Peak, fake_cuda, meta_model, to_fake

SHAPE = {"layers": 2, "vision_layers": 1}
RECIPES: dict[str, dict[str, Any]] = {
    "projector": {"finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False},
    "last 2": {"finetuning_type": "freeze", "freeze_trainable_layers": 2, "freeze_multi_modal_projector": False},
    "lora": {"finetuning_type": "lora", "lora_rank": 16, "lora_dropout": 0.05},
    "dora": {"finetuning_type": "lora", "lora_rank": 8, "use_dora": True},
    "full": {"finetuning_type": "full"},
    "tower": {"finetuning_type": "full", "freeze_vision_tower": False, "freeze_multi_modal_projector": False},
}


def make_spec(**values: Any) -> TrainSpec:
    return TrainSpec(model_name_or_path="m", dataset="d", template="gemma3", do_train=True, **values)


def test_what_is_cached_of_an_image_is_in_the_dtype_that_a_step_multiplies_in() -> None:
    """CUDA's autocast returns float32 from layer_norm: twice the bytes, compared within 1e-4 where 4.5e-3 is usual."""
    model = meta_model(**SHAPE)
    with fake_cuda(), torch.no_grad():
        to_fake(model)
        plain = Precision(weights=torch.bfloat16, autocast=None)
        pixels = {"pixel_values": torch.empty(2, 3, 896, 896, device="cuda")}
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert model.model.vision_tower(**pixels).last_hidden_state.dtype == torch.float32
        for precision, values in ((Precision(weights=torch.bfloat16, autocast="bf16"), pixels),
                                  (plain, {"pixel_values": pixels["pixel_values"].bfloat16()})):  # fmt: skip
            rows = tower.image_rows(model, values, precision)
            assert {(row.dtype, row.device.type, tuple(row.shape)) for row in rows} == {
                (torch.bfloat16, "cuda", (256, 1152))
            }


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("cached", [False, True], ids=["pixels", "cached"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_forward_pass_of_every_shape_of_recipe_stays_on_cuda(recipe: str, cached: bool, packed: bool) -> None:
    if cached and recipe == "tower":
        return
    model, core, _ = trained(recipe, cached=cached)
    with fake_cuda():
        to_fake(model)
        share_the_head(core)
        batch = batch_on("cuda", core, cached=cached, packed=packed)
        with torch.autocast("cuda", dtype=torch.bfloat16), without_waiting_checks(), Peak() as counted:
            found = model(**batch).loss
        assert (found.dtype, found.device.type) == (torch.float32, "cuda")
    assert counted.kernels.total() > 100
    assert not counted.waits, "a fake tensor has no content that the host could wait for"


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_the_loss_of_preferences_and_what_is_logged_of_it_stay_on_cuda_unread(stage: str) -> None:
    model, core, _ = trained("lora", cached=True)
    spec = make_spec(stage=stage, bf16=True, pref_ftx=0.1)
    with fake_cuda():
        to_fake(model)
        share_the_head(core)
        batch = batch_on("cuda", core, cached=True)
        kept = torch.zeros(2 if stage == "dpo" else 4, device="cuda")  # what the reference says
        with torch.autocast("cuda", dtype=torch.bfloat16), without_waiting_checks(), Peak() as counted:
            if stage == "dpo":
                found = preferences.pair_loss(spec, *preferences.sequence_logps(model, batch), kept)
            else:
                others = preference_tuner.other_logps(model, {"others": batch_on("cuda", core, cached=True)})
                own, expected = kept.chunk(2)
                marks = torch.zeros(2, dtype=torch.bool, device="cuda")
                logps = preferences.sequence_logps(model, batch)
                found = preferences.mark_loss(spec, *logps, own, others - expected, marks)
        made = (found.loss, *found.facts.values())
        assert {(tensor.device.type, tensor.dtype) for tensor in made} == {("cuda", torch.float32)}
    assert not counted.waits


@pytest.mark.parametrize("cached", [False, True], ids=["pixels", "cached"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_backward_pass_of_every_shape_of_recipe_gives_float32_gradients(recipe: str, cached: bool) -> None:
    """On fake CPU tensors under CUDA's rules: PyTorch's backward pass wants a real device for `cuda`."""
    if cached and recipe == "tower":
        return
    model, core, names = trained(recipe, cached=cached)
    with simulation.cuda_rules():
        simulation.to_fake(model)
        share_the_head(core)
        batch = batch_on("cpu", core, cached=cached)
        with torch.autocast("cpu", dtype=torch.bfloat16), without_waiting_checks():
            found = model(**batch).loss
        with Peak("cpu") as counted:
            found.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert set(gradients) == set(names)
        assert {None if grad is None else grad.dtype for grad in gradients.values()} == {torch.float32}
    assert not counted.waits


@pytest.mark.parametrize("recipe", ["lora", "dora"])
def test_adapters_are_merged_on_the_card_that_they_were_trained_on(recipe: str) -> None:
    """As a run publishes them: nothing of it is computed, or left, in main memory."""
    model, _, names = trained(recipe, cached=False)
    with fake_cuda(), torch.no_grad():
        to_fake(model)
        load_trainable(model, {name: torch.ones(p.shape) for name, p in model.named_parameters() if p.requires_grad})
        merged = model.merge_and_unload()
        cast_weights(merged, torch.bfloat16)
        tensors = merged.state_dict()
        assert not any("lora" in name for name in tensors) and names
        assert {(tensor.device.type, tensor.dtype) for tensor in tensors.values()} == {("cuda", torch.bfloat16)}


def trained(recipe: str, *, cached: bool) -> tuple[Any, Any, list[str]]:
    """A model on `meta` with what a recipe trains, its Gemma 3, and the names of what trains."""
    trainable = freezing.apply(make_spec(bf16=True, **RECIPES[recipe]), meta_model(**SHAPE))
    core = base_model(trainable.model)
    core.config.text_config.use_cache = False
    if cached:
        tower.install(core)
    assert loss.install(core) == (recipe not in ("full", "tower"))
    return trainable.model.train(), core, list(trainable.names)


def share_the_head(core: Any) -> None:
    if hasattr(core, "_frozen_head"):
        core._frozen_head[0].weight = core.get_input_embeddings().weight


def batch_on(device: str, core: Any, *, cached: bool, packed: bool = False) -> dict[str, Any]:
    num_rows, num_tokens = 2, 304
    ids, types, attention = (torch.zeros((num_rows, num_tokens), dtype=torch.long, device=device) for _ in range(3))
    pixels = (torch.empty(num_rows * 256, 1152, dtype=torch.bfloat16, device=device) if cached
              else torch.empty(num_rows, 3, 896, 896, device=device))  # fmt: skip
    places, labels = (torch.zeros(num_rows, 8, dtype=torch.long, device=device) for _ in range(2))
    batch = {"input_ids": ids, "token_type_ids": types, "pixel_values": pixels, "labels": ids,
             "logits_to_keep": places, "shift_labels": labels, "attention_mask": attention}  # fmt: skip
    if packed:
        batch |= {"position_ids": torch.zeros_like(ids)}
        batch["attention_mask"] = gemma3_masks(batch, core.config.text_config)
    return batch
