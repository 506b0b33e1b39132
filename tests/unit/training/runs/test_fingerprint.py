"""A run's name identifies what it computes, no more and no less."""

import pytest

from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.runs.plan import run_fingerprint


def name_of(train: str = "t1", val: str = "v1", model: str = "m1", num_processes: int = 1, **values: object) -> str:
    fixed = {"model_name_or_path": "m", "dataset": "a", "eval_dataset": "b", "template": "gemma3", "do_train": True}
    spec = TrainSpec(**fixed | values)  # pyright: ignore[reportArgumentType]
    digests = {spec.train_entries[0]: train, spec.train_entries[-1]: train, "b": val}
    return run_fingerprint(
        spec,
        data_digests=digests,
        pretrained_fingerprint=model,
        num_processes=num_processes,
    )


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3},
        {"seed": 1},
        {"num_train_epochs": 1},
        {"warmup_ratio": 0.1},
        {"finetuning_type": "full"},
        {"bf16": True},
        {"quantization_bit": 4},
        {"torch_compile": True},
        {"enable_liger_kernel": True},
        {"cutoff_len": 64},
        {"max_samples": 9},
        {"train": "t2"},
        {"model": "m2"},
        {"num_processes": 2},
        {"disable_shuffling": True},
        {"lora_rank": 4},
        {"freeze_vision_tower": False},
        {"use_dora": True},
        {"use_rslora": True},
        {"train_on_prompt": True},
        {"mask_history": True},
        {"packing": True},
        {"neat_packing": True},
        {"eval_dataset": None, "val_size": 0.2},
        {"default_system": "Answer."},
        {"default_system": ""},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"loraplus_lr_ratio": 4.0},
        {"additional_target": "multi_modal_projector"},
        {"pissa_init": True},
        {"finetuning_type": "oft"},
        {"vision_lr": 1e-6},
        {"flash_attn": "disabled"},
        {"stage": "grpo", "reward": {"exact_match": 1}},
    ],
    ids=str,
)
def test_what_changes_the_weights_changes_the_name(change: dict) -> None:
    assert name_of(**change) != name_of()


@pytest.mark.parametrize(
    "change",
    [
        {"logging_steps": 1},
        {"save_steps": 1},
        {"save_total_limit": 1},
        {"output_dir": "elsewhere"},
        {"dataloader_num_workers": 4},
        {"eval_strategy": "epoch"},
        {"per_device_eval_batch_size": 1},
        {"val": "v2"},
        {"dataset": "renamed"},
        {"model_name_or_path": "moved"},
        {"plot_loss": True},
        {"use_cpu": True},
        {"disable_gradient_checkpointing": True},
        {"lora_alpha": 16},  # the default, spelled out
        {"ddp_timeout": 180000000},
        {"preprocessing_batch_size": 10},  # nothing is packed
        {"mix_strategy": "interleave_under"},  # of one entry
        {"pissa_iter": 4},  # without pissa_init
        {"flash_attn": "auto"},
        {"freeze_trainable_layers": 3},  # it is a LoRA recipe
        {"quantization_type": "fp4", "double_quantization": False},  # nothing is quantised
    ],
    ids=str,
)
def test_what_does_not_change_the_weights_keeps_the_name(change: dict) -> None:
    """A new name would throw a finished run away because somebody wanted more log lines."""
    assert name_of(**change) == name_of()


def test_a_key_that_runs_are_older_than_leaves_their_names() -> None:
    """Each new key would otherwise throw away every finished run."""
    assert name_of() == "1b00cb2b4db8fc77"


@pytest.mark.parametrize(
    "change", [{"val": "v2"}, {"eval_steps": 250}, {"per_device_eval_batch_size": 1}, {"save_steps": 1500}], ids=str
)
def test_evaluation_counts_where_it_picks_the_weights(change: dict) -> None:
    chosen = {"eval_strategy": "steps", "load_best_model_at_end": True}
    assert name_of(**{**chosen, **change}) != name_of(**chosen)


@pytest.mark.parametrize(
    ("change", "given"),
    [
        ({"mix_strategy": "interleave_under"}, {"dataset": "a,c"}),
        ({"interleave_probs": "0.3,0.7"}, {"dataset": "a,c", "mix_strategy": "interleave_over", "eval_dataset": None}),
        ({"preprocessing_batch_size": 10}, {"packing": True}),
        ({"preprocessing_num_workers": 2}, {"packing": True}),
        ({"quantization_type": "fp4"}, {"quantization_bit": 4}),
        ({"double_quantization": False}, {"quantization_bit": 4}),
    ],
    ids=str,
)
def test_a_key_counts_where_it_is_read(change: dict, given: dict) -> None:
    assert name_of(**given, **change) != name_of(**given)


def test_the_order_of_entries_counts() -> None:
    """They are concatenated, so another order trains on other batches."""
    spec = {"model_name_or_path": "m", "template": "gemma3", "do_train": True}
    names = {
        run_fingerprint(
            TrainSpec(**{**spec, "dataset": order}),
            data_digests={"a": "1", "b": "2"},
            pretrained_fingerprint="m",
        )
        for order in ("a,b", "b,a")
    }
    assert len(names) == 2
