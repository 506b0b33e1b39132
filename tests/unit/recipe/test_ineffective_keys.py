"""A key that is in a recipe and does nothing is named before the run starts."""

from pathlib import Path

import pytest

from mllm_assets.recipe.load import load_recipe

BASE = "model_name_or_path: m\ndataset: d\ntemplate: gemma3\ndo_train: true\n"


@pytest.mark.parametrize(
    ("lines", "note"),
    [
        ("finetuning_type: full\nlora_rank: 4", "lora_rank has no effect: finetuning_type is full, not lora."),
        ("use_dora: true\nfinetuning_type: freeze", "use_dora has no effect: finetuning_type is freeze, not lora."),
        ("freeze_trainable_layers: 3", "freeze_trainable_layers has no effect: finetuning_type is lora, not freeze."),
        (
            "freeze_multi_modal_projector: false",
            "freeze_multi_modal_projector has no effect: LoRA trains adapters only, and the projector gets none; "
            "additional_target names modules that train whole.",
        ),
        (
            "preprocessing_num_workers: 4",
            "preprocessing_num_workers has no effect: rows are encoded while they are read, and nothing is cached.",
        ),
        ("mix_strategy: interleave_over", "mix_strategy has no effect: there is one entry, and nothing to mix."),
        ("max_steps: 5\nnum_train_epochs: 2", "num_train_epochs has no effect: max_steps is set and wins."),
        (
            "quantization_type: fp4",
            "quantization_type has no effect: quantization_bit is not set, so nothing is quantised.",
        ),
        (
            "quantization_bit: 8\ndouble_quantization: false",
            "double_quantization has no effect: quantization_bit is 8, and only 4 bits have kinds.",
        ),
        ("eval_steps: 10", "eval_steps has no effect: eval_strategy is no."),
        ("save_strategy: epoch\nsave_steps: 10", "save_steps has no effect: save_strategy is epoch."),
        (
            "val_size: 0.1",
            "val_size has no effect: eval_strategy is no: its rows are held out all the same, and not evaluated.",
        ),
        ("pref_beta: 0.3", "pref_beta has no effect: stage is sft, not dpo or kto."),
        ("kto_chosen_weight: 2", "kto_chosen_weight has no effect: stage is sft, not kto."),
        ("reward: {exact_match: 1}", "reward has no effect: stage is sft, not grpo."),
        (
            "stage: grpo\nreward: {exact_match: 1}\nmask_history: true",
            "mask_history has no effect: stage is grpo, which learns the model's own last answers only.",
        ),
        ("stage: kto\npref_loss: orpo", "pref_loss has no effect: stage is kto, not dpo."),
        (
            "stage: dpo\nlora_dropout: 0.1",
            "lora_dropout has no effect: stage is dpo, where nothing is dropped: answers are compared with the "
            "reference.",
        ),
        (
            "eval_on_each_dataset: true",
            "eval_on_each_dataset has no effect: no eval_dataset is evaluated while training.",
        ),
        ("greater_is_better: true", "greater_is_better has no effect: evaluation does not choose the weights."),
        (
            "liger_kernel_config: {rope: false}",
            "liger_kernel_config has no effect: enable_liger_kernel takes all of Liger's kernels for the text layers, "
            "and the loss is this engine's own.",
        ),
        ("pissa_iter: 4", "pissa_iter has no effect: pissa_init is not set."),
        ("vision_lr: 1e-4", "vision_lr has no effect: freeze_vision_tower is true, so nothing of the tower trains."),
        ("merger_lr: 1e-4", "projector_lr has no effect: the projector does not train."),
        ("preserve_thinking: true", "preserve_thinking has no effect: the template gemma3 has no place for reasoning."),
    ],
)
def test_a_key_without_effect_is_named(tmp_path: Path, lines: str, note: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(BASE + lines + "\n")
    assert note in load_recipe(path).notes


@pytest.mark.parametrize(
    "lines",
    [
        "lora_rank: 4",
        "packing: true\npreprocessing_num_workers: 4",
        "eval_strategy: steps\neval_steps: 5\neval_dataset: e",
        "finetuning_type: freeze\nfreeze_trainable_layers: 3\nfreeze_multi_modal_projector: false\nprojector_lr: 1e-3",
        "freeze_multi_modal_projector: false\nadditional_target: multi_modal_projector\nloraplus_lr_ratio: 4",
    ],
)
def test_a_key_with_effect_is_not(tmp_path: Path, lines: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(BASE + lines + "\n")
    assert load_recipe(path).notes == ()


def test_an_entry_that_is_named_twice_is_said(tmp_path: Path) -> None:
    """`dataset: a,a` trained on each row twice an epoch, without a word."""
    path = tmp_path / "r.yaml"
    path.write_text(BASE.replace("dataset: d", "dataset: a,b,a"))
    assert load_recipe(path).notes == ("dataset names a 2 times: each of its rows is read 2 times.",)
