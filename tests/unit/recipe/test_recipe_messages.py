"""Every mistake that a recipe can hold: what is said, with file and line and a next step."""

import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from mllm_assets.errors import RecipeError
from mllm_assets.recipe.load import Recipe, load_recipe
from mllm_assets.recipe.spec import TrainSpec

BASE = "model_name_or_path: model\ndataset: emoji_train\ntemplate: gemma3\ndo_train: true\n"  # 4 lines


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a recipe `r.yaml` and load it from its own folder, so that messages start with "r.yaml"."""
    monkeypatch.chdir(tmp_path)

    def _load(text: str, overrides=None) -> Recipe:
        Path("r.yaml").write_text(text)
        return load_recipe(Path("r.yaml"), overrides)

    return _load


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", "r.yaml:5: unknown key 'learning_rat'. Did you mean learning_rate?"),
        ("freeze_vison_tower: true", "r.yaml:5: unknown key 'freeze_vison_tower'. Did you mean freeze_vision_tower?"),
        ("zzz: 1", "r.yaml:5: unknown key 'zzz'. Delete the line; keys are those of LLaMA-Factory's SFT."),
        ("dataset: other", "r.yaml:5: dataset is set a second time; the first is r.yaml:2. Delete one."),
        ("seed: tree", "r.yaml:5: seed: expected a whole number, got the text 'tree'. Change the value."),
        ("seed: 1.5", "r.yaml:5: seed: expected a whole number, got 1.5. Change the value."),
        ("seed: true", "r.yaml:5: seed: expected a whole number, got true. Change the value."),
        ("seed:", "r.yaml:5: seed: expected a whole number, got null. Change the value."),
        ('bf16: "yes"', "r.yaml:5: bf16: expected true or false, got the text 'yes'. Change the value."),
        ("bf16: 1", "r.yaml:5: bf16: expected true or false, got 1. Change the value."),
        ("learning_rate: .nan", "r.yaml:5: learning_rate: expected a number, got nan. Change the value."),
        (
            "finetuning_type: oft\noft_rank: 4",
            "r.yaml:6: oft_rank is 4 and oft_block_size 32: each follows from the other. Set one of the two to 0 and "
            "the other above it.",
        ),
        ("streaming: true", "r.yaml:5: streaming needs max_steps. Add a line max_steps: with their number."),
        ("output_dir: 7", "r.yaml:5: output_dir: expected text, got 7. Change the value."),
        (
            "use_galore: true",
            "r.yaml:5: use_galore is not supported with this value: the engine trains with the optimizers that optim "
            "names. Delete the line and choose one there.",
        ),
        (
            "optim: lion_8bit",
            "r.yaml:5: optim: expected one of adamw_torch, adamw_torch_fused, adafactor, sgd, adagrad, rmsprop, "
            "adamw_8bit, adamw_bnb_8bit, paged_adamw_8bit, paged_adamw_32bit, got the text 'lion_8bit'. Set optim: "
            "adamw_8bit, or paged_adamw_8bit, which moves states off a full GPU.",
        ),
        (
            "optim: muon",
            "r.yaml:5: optim: expected one of adamw_torch, adamw_torch_fused, adafactor, sgd, adagrad, rmsprop, "
            "adamw_8bit, adamw_bnb_8bit, paged_adamw_8bit, paged_adamw_32bit, got the text 'muon'. Set optim: "
            "adamw_torch_fused, LLaMA-Factory's default.",
        ),
        (
            "quantization_bit: 4\nadd_tokens: <a>",
            "r.yaml:5: quantization_bit together with new tokens has not been tried. Add the tokens in a run without",
        ),
        (
            "quantization_bit: 4\nfinetuning_type: full",
            "r.yaml:5: quantization_bit leaves only adapters to train, and finetuning_type is full. Set",
        ),
        ("quantization_bit: 3", "r.yaml:5: quantization_bit: expected one of 4, 8 or null, got 3. Change the value."),
        (
            "quantization_bit: 4\nfsdp: true",
            "r.yaml:5: quantization_bit holds the complete model on each device, and fsdp or deepspeed spreads it.",
        ),
        (
            "torch_compile: true\nfsdp: true",
            "r.yaml:5: torch_compile together with fsdp has not been tried. Delete one.",
        ),
        ("torch_compile_backend: eager", "r.yaml:5: torch_compile_backend is set, and nothing is compiled. Set torch"),
        (
            "quantization_method: hqq",
            "r.yaml:5: quantization_method is not supported with this value: only bitsandbytes quantises here. Set",
        ),
        (
            "stage: ppo",
            "r.yaml:5: stage: expected one of sft, dpo, kto, rm, grpo, got the text 'ppo'. Set stage: sft for answers "
            "to learn, dpo for pairs of which one is preferred, kto for marked answers, rm for a reward model of "
            "pairs, grpo for the model's own answers with a reward.",
        ),
        (
            "stage: grpo",
            "r.yaml: stage: grpo needs a reward. Add a line with metrics and their weights, such as reward:",
        ),
        (
            "stage: grpo\nreward: {bleu: 1}",
            "r.yaml:6: reward names 'bleu': expected of label_accuracy, exact_match, rouge_1, rouge_2,",
        ),
        (
            "stage: grpo\nreward: {cider_d: 1}",  # weighs words by the references beside, here those of a batch
            "r.yaml:6: reward names 'cider_d': expected of label_accuracy, exact_match, rouge_1, rouge_2,",
        ),
        (
            "stage: grpo\nreward: {exact_match: much}",
            "r.yaml:6: reward: exact_match is 'much': expected a number that is not 0. Correct it.",
        ),
        (
            "stage: grpo\nreward: {character_error_rate: 1}",
            "r.yaml:6: reward: character_error_rate is 1, and less of it is better. Give it a weight below 0.",
        ),
        (
            "stage: grpo\nreward: {exact_match: 1}\nneat_packing: true",
            "r.yaml:7: neat_packing is for stage: sft, and stage is grpo. Delete the line.",
        ),
        (
            "stage: grpo\nreward: {exact_match: 1}\nquantization_bit: 4",
            "r.yaml:7: quantization_bit together with stage: grpo has not been tried. Delete the line.",
        ),
        (
            "stage: grpo\nreward: {exact_match: 1}\nnum_generations: 1",
            "r.yaml:7: num_generations is 1: expected 2 or more, for answers are compared. Change it or delete the",
        ),
        (
            "stage: grpo\nreward: {exact_match: 1}\nloss_type: dapo",
            "r.yaml:7: loss_type: expected one of bnpo, grpo, dr_grpo, got the text 'dapo'. Set loss_type: bnpo, which",
        ),
        (
            "stage: dpo\npref_loss: ipo",
            "r.yaml:6: pref_loss: expected one of sigmoid, orpo, simpo, got the text 'ipo'. Set pref_loss: sigmoid, "
            "which LLaMA-Factory 0.9.5 computes for hinge, ipo and kto_pair as well.",
        ),
        ("stage: dpo\npacking: true", "r.yaml:6: packing is for stage: sft, and stage is dpo. Delete the line."),
        (
            "stage: dpo\npissa_init: true",
            "r.yaml:6: pissa_init changes the base, and the reference of stage: dpo is the base without its adapters.",
        ),
        (
            "stage: dpo\npref_loss: orpo\ndpo_label_smoothing: 0.1",
            "r.yaml:7: dpo_label_smoothing is of pref_loss: sigmoid, and pref_loss is orpo. Delete one of the two.",
        ),
        ("pref_beta: 0", "r.yaml:5: pref_beta is 0: expected a number above 0. Change it or delete the line."),
        (
            "pissa_init: true\nquantization_bit: 4",
            "r.yaml:5: pissa_init takes the adapters out of the base's weights, and quantization_bit holds those in",
        ),
        (
            "loraplus_lr_ratio: 4\nvision_lr: 1e-5",
            "r.yaml:5: loraplus_lr_ratio gives LoRA's two matrices a learning rate each, and vision_lr and projector",
        ),
        ("loraplus_lr_ratio: 0", "r.yaml:5: loraplus_lr_ratio is 0: expected a number above 0. Change it or delete"),
        ("label_smoothing_factor: 1", "r.yaml:5: label_smoothing_factor is 1: expected 0 or more and below 1. Change"),
        ("neftune_noise_alpha: -1", "r.yaml:5: neftune_noise_alpha is -1: expected 0 or more. Change it or delete"),
        ("neat_packing: true\nflash_attn: disabled", "r.yaml:6: neat_packing keeps rows apart with masks that only"),
        ("flash_attn: fa3", "r.yaml:5: flash_attn: expected one of auto, disabled, sdpa, fa2, got the text 'fa3'."),
        ("val_size: 1.5", "r.yaml:5: val_size is 1.5: expected a share above 0 and below 1, or a number of rows"),
        ("val_size: 0.1\neval_dataset: b", "r.yaml:5: val_size and eval_dataset are both set"),
        ("mask_history: true\ntrain_on_prompt: true", "r.yaml:5: mask_history supervises the last answer only and"),
        ("interleave_probs: 0.5,0.5", "r.yaml:5: interleave_probs says how often to draw from each entry, and mix"),
        (
            "mix_strategy: interleave_over\ninterleave_probs: a,b",
            "r.yaml:6: interleave_probs is 'a,b': expected numbers such as 0.7,0.3. Correct it.",
        ),
        (
            "mix_strategy: interleave_over\ninterleave_probs: 0.5,0.4",
            "r.yaml:6: interleave_probs is 0.5,0.4: expected shares that sum to 1. Correct them.",
        ),
        (
            "mix_strategy: interleave_over\ninterleave_probs: 0.5,0.5",
            "r.yaml:6: interleave_probs has 2 numbers, and dataset 1 entries. Give one each.",
        ),
        ("learning_rate: -1.0", "r.yaml:5: learning_rate is -1.0: expected 0 or more. Change it or delete the line."),
        (
            "seed: 99999999999",
            "r.yaml:5: seed is 99999999999: expected a number below 2**32, numpy's limit. Change it.",
        ),
        (
            "max_steps: -5",
            "r.yaml:5: max_steps is -5: expected at least 1, or -1 to train num_train_epochs. Change it.",
        ),
        ("cutoff_len: 0", "r.yaml:5: cutoff_len is 0: expected a number above 0. Change it or delete the line."),
        ("max_samples: 0", "r.yaml:5: max_samples is 0: expected a number above 0. Change it or delete the line."),
        ("lora_dropout: 1", "r.yaml:5: lora_dropout is 1: expected 0 or more and below 1. Change it."),
        ("warmup_ratio: 10", "r.yaml:5: warmup_ratio is 10: expected a share from 0 to 1. Change it."),
        ("save_steps: 2.5", "r.yaml:5: save_steps is 2.5: expected a whole number or a share below 1. Change it."),
        ("logging_steps: 0", "r.yaml:5: logging_steps is 0: expected a whole number or a share below 1. Change it."),
        ("image_max_pixels: 100", "r.yaml:5: image_max_pixels is 100, below image_min_pixels 1024. Raise it."),
        ("bf16: true\nfp16: true", "r.yaml:6: bf16 and fp16 are both true. Keep one: bf16 where the GPU has it."),
        ("warmup_ratio: 0.1\nwarmup_steps: 9", "r.yaml:5: warmup_ratio and warmup_steps are both set"),
        ("dataloader_prefetch_factor: 2", "r.yaml:5: dataloader_prefetch_factor needs loader processes, and"),
        ("eval_strategy: steps", "r.yaml:5: eval_strategy is steps but there is no eval_dataset. Name an entry of"),
        ("load_best_model_at_end: true", "r.yaml:5: load_best_model_at_end needs evaluation during training. Set"),
        ("early_stopping_steps: 2", "r.yaml:5: early_stopping_steps needs evaluation during training. Set eval"),
        ("lr_scheduler_type: reduce_lr_on_plateau", "r.yaml:5: reduce_lr_on_plateau needs evaluation during training."),
        (
            "optim: adamw_8bit\nfsdp: true",
            "r.yaml:5: optim: adamw_8bit together with fsdp has not been tried. Set optim: adamw_torch_fused.",
        ),
        (
            "eval_dataset: a,b\neval_strategy: epoch\nsave_strategy: epoch\nload_best_model_at_end: true\n"
            "eval_on_each_dataset: true",
            "r.yaml: metric_for_best_model is 'loss', and eval_on_each_dataset measures eval_a_loss, eval_b_loss. Set "
            "it to the one that chooses.",
        ),
        ("metric_for_best_model: eval_b_loss", "r.yaml:5: metric_for_best_model is 'eval_b_loss', and the loss on all"),
        (
            "metric_for_best_model: blue",
            "r.yaml:5: metric_for_best_model is 'blue': expected loss, or one of label",
        ),
        ("metric_for_best_model: perplexity", "r.yaml:5: metric_for_best_model is 'perplexity': expected loss, or one"),
        (
            "metric_for_best_model: anls\ngreater_is_better: false",
            "r.yaml:6: greater_is_better is false, and a higher anls is better. Delete the line.",
        ),
        (
            "metric_for_best_model: loss\ngreater_is_better: true",
            "r.yaml:6: greater_is_better is true, and a lower loss is better. Delete the line.",
        ),
        (
            "metric_for_best_model: anls\nval_size: 0.1\neval_strategy: steps",
            "r.yaml:5: metric_for_best_model is anls, which is of answers to an entry, and val_size holds rows out.",
        ),
        (
            "metric_for_best_model: anls\nfsdp: true",
            "r.yaml:6: fsdp together with metric_for_best_model: anls has not been tried. Set metric_for_best_",
        ),
        (
            "eval_dataset: v\neval_strategy: epoch\nload_best_model_at_end: true",
            "r.yaml:7: load_best_model_at_end needs equal strategies: eval_strategy is epoch, save_strategy steps. "
            "Make them the same.",
        ),
        (
            "eval_dataset: v\neval_strategy: steps\neval_steps: 4\nsave_steps: 6\nload_best_model_at_end: true",
            "r.yaml:8: load_best_model_at_end needs an evaluation at each checkpoint: save_steps 6 is not a multiple "
            "of eval_steps 4. Change one.",
        ),
        (
            "output_dir: outputs/../../x",
            "r.yaml:5: output_dir 'outputs/../../x' may leave the project's folder. Write a relative path without ..,",
        ),
        (
            "output_dir: .",
            "r.yaml:5: output_dir is '.', which holds more than the runs of one recipe. Name a folder of",
        ),
        (
            "output_dir: ./outputs/",
            "r.yaml:5: output_dir is './outputs/', which holds more than the runs of one recipe.",
        ),
        ("output_dir: /", "r.yaml:5: output_dir is '/', which is a root, a home or a hidden folder. Name a folder of"),
        ("output_dir: ~/.ssh", "r.yaml:5: output_dir is '~/.ssh', which is a root, a home or a hidden folder. Name"),
        ("output_dir: .git/x", "r.yaml:5: output_dir is '.git/x', which is a root, a home or a hidden folder. Name"),
        ("output_dir: data", "r.yaml:5: output_dir is 'data', and data/ has other contents than runs. Name a folder"),
        (
            "output_dir: pretrains/x",
            "r.yaml:5: output_dir is 'pretrains/x', and pretrains/ has other contents than runs.",
        ),
        (f"output_dir: outputs/{'x' * 300}", "r.yaml:5: output_dir has a name of more than 200 bytes."),
        ("output_dir: //", "r.yaml:5: output_dir is '//', which is a root, a home or a hidden folder."),
        ("output_dir: DATA/x", "r.yaml:5: output_dir is 'DATA/x', and DATA/ has other contents than runs."),
        ("output_dir: Outputs", "r.yaml:5: output_dir is 'Outputs', which holds more than the runs of one recipe."),
        (
            "output_dir: outputs/a/latest",
            "r.yaml:5: output_dir is 'outputs/a/latest', and latest/ is of another recipe's runs.",
        ),
        (
            "output_dir: outputs/a/predictions",
            "r.yaml:5: output_dir is 'outputs/a/predictions', and predictions/ is of another",
        ),
        (
            "output_dir: outputs/a/0123456789abcdef/x",
            "r.yaml:5: output_dir is 'outputs/a/0123456789abcdef/x', and 0123456789abcdef/ is of",
        ),
        ('output_dir: " data"', "r.yaml:5: output_dir is ' data', with a space where a name begins or ends."),
        ("adam_beta2: 1.5", "r.yaml:5: adam_beta2 is 1.5: expected 0 or more and below 1."),
        (
            f"max_steps: {'9' * 400}",
            f"r.yaml:5: max_steps: expected a whole number, got {'9' * 80} (cut). Change the",
        ),
        (f"learning_rate: {'9' * 400}", f"r.yaml:5: learning_rate: expected a number, got {'9' * 80} (cut). Change"),
        ("group_by_length: [a]", "r.yaml:5: group_by_length: expected one of random, sequential, group_by_length, got"),
        (
            "lr_scheduler_kwargs: {a: !!binary aGVs}",
            "r.yaml:5: lr_scheduler_kwargs: expected a mapping of names to values of JSON or null, got {'a': b'hel'}.",
        ),
        (
            "lr_scheduler_kwargs: {1: .nan}",
            "r.yaml:5: lr_scheduler_kwargs: expected a mapping of names to values of JSON",
        ),
        (
            'output_dir: "outputs/a\\0b"',
            "r.yaml:5: output_dir 'outputs/a\\x00b' has a character that is not printable.",
        ),
        ("deepspeed: ../ds.json", "r.yaml:5: deepspeed '../ds.json' may leave the project's folder."),
        (
            "run_name: hf_0123456789abcdefghij",
            "r.yaml:5: the value of run_name holds what looks like a token or password. A recipe is copied into",
        ),
        ("group_by_length: 7", "r.yaml:5: group_by_length: expected one of random, sequential, group_by_length, got 7"),
        (
            "train_sampling_strategy: random\ngroup_by_length: true",
            "r.yaml:6: group_by_length is another name of train_sampling_strategy, which is set too. Keep one.",
        ),
    ],
)
def test_a_wrong_line_is_named_with_a_next_step(load, line: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(BASE + line + "\n")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 1\nlearning_rate:1e-4\nbf16: true\n",
            "r.yaml:3: this is not YAML, at column 1: could not find expected ':'. Look at that line and the one "
            "before it: a missing space after a colon, a tab or an open quote.",
        ),
        ("a: 'open\n", "r.yaml:2: this is not YAML, at column 1: found unexpected end of stream. Look at that line"),
        ("seed: 1\n\tbf16: true\n", "r.yaml:2: this is not YAML, at column 1: found character '\\t' that cannot start"),
        ("- a\n- b\n", "r.yaml:1: expected lines of `key: value`. Write one key per line."),
        ("# nothing\n", "r.yaml is empty. Write a LLaMA-Factory recipe into it"),
        (
            "seed: !!python/object/apply:os.getcwd []\n",
            "r.yaml:1: the value of seed cannot be read (could not determine",
        ),
        ("[" * 5000, "r.yaml is not read: it is nested deeper than 50 levels. Write a recipe: lines of `key: value`."),
        ("a: \x00\n", "r.yaml: this is not YAML: unacceptable character #x0000"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: this is not YAML, at column 1: but found another document. Look at that line"),
        (BASE.replace("do_train: true", ""), "r.yaml: do_train is false, LLaMA-Factory's default: this recipe trains"),
        (BASE.replace("do_train: true", "do_train: false"), "r.yaml:4: do_train is false, LLaMA-Factory's default"),
        (
            BASE.replace("gemma3", "qwen"),
            "r.yaml:3: template is 'qwen': expected one of gemma3, gemma4, gemma4n, qwen2_vl",
        ),
        (BASE.replace("emoji_train", '" ,"'), "r.yaml:2: dataset is empty. Name an entry of dataset_info.json"),
        ("seed: 1\n", "r.yaml: model_name_or_path is missing. Add a line model_name_or_path: with the directory of"),
        ("model_name_or_path: m\n", "r.yaml: dataset is missing. Add a line dataset: with the entry of"),
        ("model_name_or_path: m\ndataset: d\n", "r.yaml: template is missing. Add a line template: with gemma3."),
    ],
)
def test_a_file_that_cannot_be_a_recipe_is_explained(load, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert str(caught.value).startswith(message)


def test_a_missing_file_a_folder_and_a_binary_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^There is no recipe .*none.yaml. Check the path"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").touch()
    with pytest.raises(RecipeError, match=r"^There is no recipe .*mine. Did you mean .*/configs/mine.yaml\?$"):
        load_recipe(tmp_path / "mine")
    with pytest.raises(RecipeError, match=r"cannot be read as a text file \(.*Is a directory.*\). Name a YAML file.$"):
        load_recipe(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"b.yaml cannot be read as a text file \('utf-8' codec"):
        load_recipe(tmp_path / "b.yaml")


@pytest.mark.attack("YAML")
@pytest.mark.parametrize("num_zeros", [18, 400, 5000])
def test_a_number_that_would_overflow_is_refused_by_its_line(load, num_zeros: int) -> None:
    """`ddp_timeout: 1e18` was taken, and ended in an OverflowError of the library hours later."""
    with pytest.raises(RecipeError) as caught:
        load(f"{BASE}ddp_timeout: 1{'0' * num_zeros}\n")
    assert re.match(r"r\.yaml:5: (the value of )?ddp_timeout:? ", str(caught.value)) and len(str(caught.value)) < 300


NUMBERS = sorted(key for key, hint in get_type_hints(TrainSpec).items() if {int, float} & {hint, *get_args(hint)})
HELD = {"val_size", "max_grad_norm", "adam_epsilon", "warmup_steps"}  # a number of rows, no clipping, and floats


@pytest.mark.attack("YAML")
@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_of_a_recipe_has_an_end(load, key: str) -> None:
    for value in ("1e300", str(10**18), str(10**400)):
        if value == str(10**18) and key in HELD:
            continue
        with pytest.raises(RecipeError) as caught:
            load(BASE, [f"{key}={value}"])
        assert f"{key}" in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("max_steps", "argument 'max_steps': expected key=value, for example max_steps=10."),
        ("max_step=3", "argument 'max_step=3': unknown key 'max_step'. Did you mean max_steps?"),
        ("max_steps=few", "argument 'max_steps=few': max_steps: expected a whole number, got the text 'few'."),
        ("max_steps=[", "argument 'max_steps=[': the value cannot be read as YAML (expected the node content"),
        ("learning_rate=-1", "argument 'learning_rate=-1': learning_rate is -1: expected 0 or more."),
    ],
)
def test_a_wrong_argument_is_named(load, argument: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(BASE, [argument])
    assert str(caught.value).startswith(message)


def test_a_token_in_a_recipe_is_refused_and_never_repeated(load) -> None:
    """A message with the value would carry the secret into logs and Dagster's event store."""
    with pytest.raises(RecipeError) as caught:
        load(BASE + "hf_hub_token: hf_sEcReT\n")
    assert str(caught.value) == (
        "r.yaml:5: hf_hub_token is not supported with this value: secrets do not belong in a recipe. "
        "Delete it here and set the environment variable HF_TOKEN."
    )


def test_all_that_is_wrong_is_said_at_once(load) -> None:
    """One refusal a try makes a recipe of ten mistakes take ten tries."""
    lines = "max_pixels: 1\nseed: tree\nuse_galore: true\nseed: 2\nlearning_rate: -1.0\nbf16: true\nfp16: true\n"
    with pytest.raises(RecipeError) as caught:
        load(BASE.replace("do_train: true\n", "") + lines, ["max_step=3"])
    assert str(caught.value).splitlines() == [
        "r.yaml:7: seed is set a second time; the first is r.yaml:5. Delete one.",
        "r.yaml:4: unknown key 'max_pixels'. Here it is image_max_pixels.",
        "r.yaml:5: seed: expected a whole number, got the text 'tree'. Change the value.",
        "r.yaml:6: use_galore is not supported with this value: the engine trains with the optimizers that optim "
        "names. Delete the line and choose one there.",
        "argument 'max_step=3': unknown key 'max_step'. Did you mean max_steps?",
        "r.yaml:8: learning_rate is -1.0: expected 0 or more. Change it or delete the line.",
        "r.yaml: do_train is false, LLaMA-Factory's default: this recipe trains nothing. Set do_train: true.",
        "r.yaml:10: bf16 and fp16 are both true. Keep one: bf16 where the GPU has it.",
    ]


def test_what_follows_from_a_mistake_is_not_said_as_another(load) -> None:
    """With `eval_datset` corrected there is an evaluation set, and a `datset` is not missing."""
    text = BASE.replace("dataset", "datset") + "eval_datset: v\neval_strategy: steps\n"
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert str(caught.value).splitlines() == [
        "r.yaml:2: unknown key 'datset'. Did you mean dataset?",
        "r.yaml:5: unknown key 'eval_datset'. Did you mean eval_dataset?",
    ]


def test_a_recipe_of_nothing_but_mistakes_is_answered_in_a_page(load) -> None:
    with pytest.raises(RecipeError) as caught:
        load(BASE + "".join(f"zzz{n}: 1\n" for n in range(1000)))
    assert len(str(caught.value).splitlines()) == 21
    assert str(caught.value).endswith("\nand 980 more.")
