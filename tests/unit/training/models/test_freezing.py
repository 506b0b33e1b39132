"""What trains, on gemma-3-4b-it's real shape and on the reference model."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3Config

from mllm_assets.errors import RecipeError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.loop.learning_rates import LearningRates
from mllm_assets.training.models import freezing
from mllm_assets.training.models.load import load_config, load_model, model_on_meta

GUIDE_PROJECTOR = {"finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False}
GUIDE_LAST_LAYERS = {
    "finetuning_type": "freeze",
    "freeze_multi_modal_projector": False,
    "freeze_trainable_layers": 2,
    "freeze_trainable_modules": "all",
    "freeze_extra_modules": "multi_modal_projector,post_layernorm",
}


def make_spec(**values: Any) -> TrainSpec:
    return TrainSpec(model_name_or_path="m", dataset="d", template="gemma3", do_train=True, **values)


def gemma_3_4b_config() -> Gemma3Config:
    """Shape of google/gemma-3-4b-it as its config.json has it; 4,300,079,472 parameters."""
    return Gemma3Config(
        text_config={
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "sliding_window": 1024,
        },
        vision_config={
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
            "image_size": 896, "patch_size": 14, "vision_use_head": False, "model_type": "siglip_vision_model",
        },
        mm_tokens_per_image=256,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("gemma3_projector_sft", GUIDE_PROJECTOR), ("gemma3_trans_projector_head_sft", GUIDE_LAST_LAYERS)],
)
def test_what_trains_for_the_guides_recipes(golden: Callable[[str, Any], None], name: str, recipe: dict) -> None:
    trainable = freezing.apply(make_spec(**recipe), model_on_meta(gemma_3_4b_config()))
    assert trainable.num_params == 4_300_079_472
    shapes = {key: list(p.shape) for key, p in trainable.model.named_parameters() if p.requires_grad}
    golden(
        f"trainable_{name}",
        {
            "num_params": trainable.num_params,
            "num_trainable_params": trainable.num_trainable_params,
            "table": trainable.table,
            "warnings": trainable.warnings,
            "trainable": shapes,
        },
    )


@pytest.mark.parametrize("name", ["projector", "freeze", "full", "lora", "lora_additional"])
def test_what_trains_equals_llamafactorys_set_in_order(parity_dir: Path, name: str) -> None:
    reference = json.loads((parity_dir / "reference" / f"{name}.json").read_text())
    known = {field.name for field in fields(TrainSpec)}
    spec = TrainSpec(**{key: value for key, value in reference["config"].items() if key in known})
    trainable = freezing.apply(spec, load_model(parity_dir / "model"))
    assert trainable.names == [key for key, _ in reference["trainable"]]
    assert trainable.num_trainable_params == reference["trainable_params"]


def test_negative_layers_count_from_the_first(parity_dir: Path) -> None:
    model = model_on_meta(load_config(parity_dir / "model"))
    trainable = freezing.apply(make_spec(finetuning_type="freeze", freeze_trainable_layers=-1), model)
    assert {row["module"] for row in trainable.table} == {"language_model.layers.0"}


def test_an_extra_module_that_stays_frozen_is_said(parity_dir: Path) -> None:
    """`post_layernorm` is the tower's alone, and the guide's recipe trains nothing with it."""
    trainable = freezing.apply(make_spec(**GUIDE_LAST_LAYERS), model_on_meta(load_config(parity_dir / "model")))
    (warning,) = trainable.warnings
    assert warning.startswith("freeze_extra_modules names post_layernorm, but it trains nothing: its 2 parameters")


def test_an_unknown_module_is_refused_with_the_nearest(parity_dir: Path) -> None:
    model = model_on_meta(load_config(parity_dir / "model"))
    with pytest.raises(RecipeError, match=r"'multi_modal_projectr', which the model does not have. Did you mean multi"):
        freezing.apply(make_spec(finetuning_type="freeze", freeze_extra_modules="multi_modal_projectr"), model)


def test_a_recipe_that_trains_nothing_is_refused(parity_dir: Path) -> None:
    model = model_on_meta(load_config(parity_dir / "model"))
    with pytest.raises(RecipeError) as caught:
        freezing.apply(make_spec(finetuning_type="full", freeze_language_model=True), model)
    assert str(caught.value) == (
        "Nothing trains: finetuning_type is full, and freeze_vision_tower, freeze_multi_modal_projector, "
        "freeze_language_model freeze all of it. Set one of them to false."
    )


def test_no_layer_at_all_is_said_to_be_the_reason(parity_dir: Path) -> None:
    """The language model was called frozen, which it is not; with the projector 0 layers are allowed, as elsewhere."""
    spec = make_spec(finetuning_type="freeze", freeze_trainable_layers=0)
    with pytest.raises(RecipeError, match=r"Nothing trains: freeze_trainable_layers is 0, which trains no layer"):
        freezing.apply(spec, model_on_meta(load_config(parity_dir / "model")))
    spec = make_spec(finetuning_type="freeze", freeze_trainable_layers=0, freeze_multi_modal_projector=False)
    trainable = freezing.apply(spec, model_on_meta(load_config(parity_dir / "model")))
    assert {row["module"] for row in trainable.table} == {"multi_modal_projector"}


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nothing_proj", r"names 'nothing_proj', which the model does not have\. Choose from: all, down_proj, fc1"),
        ("q_proj,v_prj", r"names 'v_prj', which the model does not have\. Did you mean v_proj\?"),
        ("q_prj,v_prj", r"names 'q_prj', 'v_prj', which the model does not have\. Did you mean q_proj and v_proj\?"),
        ("q_proj,all", r"names 'all', which the model does not have"),
        ("fc1", r"matches no linear layer outside what is frozen"),
    ],
)
def test_every_name_of_a_lora_target_matches_or_is_refused(parity_dir: Path, target: str, said: str) -> None:
    """`q_proj,v_prj` trained q_proj alone, without a word."""
    with pytest.raises(RecipeError, match=f"lora_target .*{said}|{said}"):
        freezing.apply(make_spec(lora_target=target), model_on_meta(load_config(parity_dir / "model")))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lora_target": "q_proj,fc1"}, "lora_target names fc1, but it trains nothing: its layers are frozen by"),
        ({"lora_target": "q_proj,lm_head"}, "lora_target names lm_head, but it trains nothing: its layers are frozen"),
        (
            {"finetuning_type": "freeze", "freeze_trainable_modules": "mlp,layer_norm1"},
            "freeze_trainable_modules names layer_norm1, but it trains nothing: none of the chosen layers has it.",
        ),
    ],
)
def test_a_name_whose_modules_stay_frozen_is_said(parity_dir: Path, values: dict[str, Any], said: str) -> None:
    trainable = freezing.apply(make_spec(**values), model_on_meta(load_config(parity_dir / "model")))
    (warning,) = trainable.warnings
    assert warning.startswith(said)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("multi_modal_projecto", r"which the model does not have\. Did you mean multi_modal_projector\?"),
        (
            "vision_tower",
            r"which is part of the vision tower, and freeze_vision_tower is true\. Set freeze_vision_tower: false",
        ),
        ("embed_tokens", r"whose weights the model's input and output share; .* Use finetuning_type: freeze with"),
        ("lm_head", r"whose weights the model's input and output share"),
    ],
)
def test_a_module_that_cannot_train_whole_beside_lora_is_refused(parity_dir: Path, target: str, said: str) -> None:
    """PEFT passes over a name that it does not find, and merges one copy of a tied embedding only."""
    with pytest.raises(RecipeError, match=f"additional_target names '?{target}'?, {said}"):
        freezing.apply(make_spec(additional_target=target), model_on_meta(load_config(parity_dir / "model")))


@pytest.mark.parametrize(
    ("values", "rates"),
    [
        ({"loraplus_lr_ratio": 4.0, "additional_target": "multi_modal_projector"}, {"lora_A": 1e-3, "lora_B": 4e-3,
                                                        "mm_input_projection": 1e-3, "mm_soft_emb_norm": 4e-3}),
        ({"finetuning_type": "full", "freeze_vision_tower": False, "freeze_multi_modal_projector": False,
          "vision_lr": 1e-5, "projector_lr": 1e-4},
         {"vision_tower": 1e-5, "multi_modal_projector": 1e-4, "language_model": 1e-3}),
        ({"finetuning_type": "full", "vision_lr": None}, None),
    ],
)  # fmt: skip
def test_each_part_learns_at_its_own_rate(
    parity_dir: Path, values: dict[str, Any], rates: dict[str, float] | None
) -> None:
    spec = make_spec(learning_rate=1e-3, **values)
    trainable = freezing.apply(spec, model_on_meta(load_config(parity_dir / "model")))
    names = {id(p): name for name, p in trainable.model.named_parameters()}
    groups = LearningRates(spec=spec, family=trainable.family).groups(trainable.model, trainable.names)
    if rates is None:
        assert groups is None
        return
    found = {names[id(p)]: group["lr"] for group in groups or () for p in group["params"]}
    assert sorted(found) == sorted(trainable.names), "each once"
    for name, rate in found.items():
        assert [rate] == [wanted for part, wanted in rates.items() if part in name], name


def test_lora_reaches_the_tower_only_when_it_is_not_frozen(parity_dir: Path) -> None:
    model = model_on_meta(load_config(parity_dir / "model"))
    assert not any("vision_tower" in name for name in freezing.lora_targets(make_spec(), model))
    assert any("vision_tower" in name for name in freezing.lora_targets(make_spec(freeze_vision_tower=False), model))
    assert not any("projector" in name for name in freezing.lora_targets(make_spec(freeze_vision_tower=False), model))
