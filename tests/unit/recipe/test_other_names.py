"""Keys of other trainers: what to write here, and never a key of another meaning that looks like theirs."""

import re

import pytest

from mllm_assets.errors import did_you_mean, nearest
from mllm_assets.recipe.keys import ALIASES, KEYS
from mllm_assets.recipe.other_names import OTHER_NAMES, advice_for

NAMES = [*KEYS, *ALIASES]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        (
            "train_mm_proj_only",
            "Set finetuning_type: full, freeze_vision_tower: true, freeze_language_model: true and ",
        ),
        ("max_pixels", "Here it is image_max_pixels."),
        ("vit_lr", "Here it is vision_lr."),
        ("system_prompt", "Here it is default_system."),
        ("max_seq_length", "Here it is cutoff_len."),
        ("freeze_vit", "Here it is freeze_vision_tower."),
        ("load_in_4bit", "Set quantization_bit: 4."),
        ("reward_funcs", "Here it is reward."),
        ("num_iterations", "Answers are drawn for each step by the model that trains, so that nothing is clipped."),
        ("lora_r", "Here it is lora_rank."),
        ("fp32", "Weights train in 32 bits where neither bf16, fp16 nor pure_bf16 is set."),
        ("LORA_R", "Here it is lora_rank."),
        ("learning_rte", "Did you mean learning_rate?"),
        ("Max_Steps", "Did you mean max_steps?"),
        ("zzz", "Delete the line; keys are those of LLaMA-Factory's SFT."),
    ],
)
def test_a_key_of_elsewhere_is_answered_with_what_to_write_here(name: str, advice: str) -> None:
    """`train_mm_proj_only` was answered with train_on_prompt, and max_pixels with video_max_pixels."""
    assert advice_for(name, NAMES)[0].startswith(advice)


def test_the_table_holds_no_key_of_our_own_and_names_only_keys_that_exist() -> None:
    assert not OTHER_NAMES.keys() & {*NAMES}
    for advice in OTHER_NAMES.values():
        named = re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", advice)
        assert {*named} - {"dataset_info"} <= KEYS.keys(), advice


@pytest.mark.parametrize("name", sorted(OTHER_NAMES))
def test_without_the_table_likeness_names_no_key_of_another_meaning(name: str) -> None:
    """Whatever relatives add next: a key that is not in the table gets no answer, and not a wrong one."""
    one_letter_apart = {"use_lora": "use_dora", "fp32": "tf32", "sdpa": "fsdp"}
    meant = {key for key in KEYS if key in OTHER_NAMES[name]}
    assert {*nearest(name, NAMES)} <= meant | {one_letter_apart.get(name, "")}


@pytest.mark.parametrize(
    ("word", "known", "near"),
    [
        ("knid", "kind", True),
        ("trian", "train", True),
        ("learning_rat", "learning_rate", True),
        ("max_pixels", "video_max_pixels", False),
        ("max_pixels", "image_max_pixels", False),
        ("vision_lr", "hub_revision", False),
        ("train_mm_proj_only", "train_on_prompt", False),
        ("seed", "need_it", False),
        ("use_peft", "use_ipex", False),
        ("freeze_multi_modl_projectr", "freeze_multi_modal_projector", True),
        ("max", "mix", True),
        ("ab", "abc", False),
        ("", "a", False),
    ],
)
def test_how_like_a_name_must_be(word: str, known: str, near: bool) -> None:
    assert did_you_mean(word, [known]) == (f"Did you mean {known!r}? " if near else "")
