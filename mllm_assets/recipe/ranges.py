"""Between which numbers each key of a recipe must be: what is outside would overflow, hang or train nothing."""

import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

# Keys whose number must be above 0, and keys where it may be 0; null passes
_POSITIVE = """per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps cutoff_len
    num_train_epochs image_min_pixels max_samples save_total_limit early_stopping_steps preprocessing_batch_size
    preprocessing_num_workers ddp_bucket_cap_mb video_fps video_maxlen video_min_pixels""".split()
_NOT_NEGATIVE = """learning_rate weight_decay max_grad_norm warmup_steps seed eval_delay dataloader_num_workers
    neftune_noise_alpha adam_epsilon ddp_timeout""".split()
# The most that a key may be, or in size where it may be negative; others may be what 32 bits hold; a float up to 1e30
_MOST: dict[str, float] = {
    "ddp_timeout": 10**9,  # seconds; LLaMA-Factory's examples have 180000000
    "ddp_bucket_cap_mb": 10**6,
    "dataloader_num_workers": 1024,  # processes
    "dataloader_prefetch_factor": 10**4,
    "preprocessing_num_workers": 1024,
    "freeze_trainable_layers": 1000,
    "video_fps": 1000,
    "video_maxlen": 10**5,
    "lora_rank": 2**16,
    "pissa_iter": 10**4,
    "learning_rate": 1000,
    "vision_lr": 1000,
    "projector_lr": 1000,
    "loraplus_lr_ratio": 10**6,
    "weight_decay": 1000,
    "neftune_noise_alpha": 10**6,
    "pref_beta": 1000,
    "beta": 1000,
    "num_generations": 2**16,
    "pref_ftx": 1000,
    "kto_chosen_weight": 1000,
    "kto_rejected_weight": 1000,
    "simpo_gamma": 1000,
    "num_train_epochs": 10**6,
    "logging_steps": 10**15,  # never, as some write it
    "eval_steps": 10**15,
    "save_steps": 10**15,
    "eval_delay": 10**15,
}
_SAID_ELSEWHERE = "seed data_seed adam_beta1 adam_beta2 label_smoothing_factor warmup_ratio lora_dropout".split()
_MAY_BE_NEGATIVE = ("lora_alpha", "freeze_trainable_layers")
_MOST_INT, _MOST_FLOAT = 2**31 - 1, 1e30


@cache
def _most_of(kind: type) -> dict[str, float]:
    """The most of each key that holds a number, also of those that `_MOST` does not name."""
    most = {}
    for name, hint in typing.get_type_hints(kind).items():
        types = set(typing.get_args(hint) or (hint,))
        if types & {int, float} and name not in _SAID_ELSEWHERE:
            most[name] = _MOST.get(name, _MOST_FLOAT if float in types else _MOST_INT)
    return most


def range_problems(spec: Any) -> Iterator[tuple[str, str]]:
    """Yield each key of a `TrainSpec` whose number is out of range, and a sentence about it."""
    if spec.max_steps < -1 or spec.max_steps == 0:
        text = f"max_steps is {spec.max_steps}: expected at least 1, or -1 to train num_train_epochs. Change it."
        yield "max_steps", text
    for key in _POSITIVE:
        value = getattr(spec, key)
        if value is not None and value <= 0:
            yield key, f"{key} is {value}: expected a number above 0. Change it or delete the line."
    for key in _NOT_NEGATIVE:
        if (getattr(spec, key) or 0) < 0:
            yield key, f"{key} is {getattr(spec, key)}: expected 0 or more. Change it or delete the line."
    for key in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(spec, key) < 1:
            yield key, f"{key} is {getattr(spec, key)}: expected 0 or more and below 1. Change it or delete the line."
    for key in ("seed", "data_seed"):
        if (getattr(spec, key) or 0) >= 2**32:
            yield key, f"{key} is {getattr(spec, key)}: expected a number below 2**32, numpy's limit. Change it."
    for key, most in _most_of(type(spec)).items():
        value = getattr(spec, key) or 0
        if value > most or (key in _MAY_BE_NEGATIVE and value < -most):
            yield key, f"{key} is {value}: expected at most {most:,}. Change it or delete the line."
    if not 0 <= spec.label_smoothing_factor < 1:
        text = f"label_smoothing_factor is {spec.label_smoothing_factor}: expected 0 or more and below 1. Change it."
        yield "label_smoothing_factor", text
    if spec.warmup_ratio is not None and not 0 <= spec.warmup_ratio <= 1:
        yield "warmup_ratio", f"warmup_ratio is {spec.warmup_ratio}: expected a share from 0 to 1. Change it."
    for kind in ("logging", "eval", "save"):
        steps = getattr(spec, f"{kind}_steps")
        if getattr(spec, f"{kind}_strategy") == "steps" and (steps <= 0 or (steps > 1 and steps != int(steps))):
            yield f"{kind}_steps", f"{kind}_steps is {steps}: expected a whole number or a share below 1. Change it."
