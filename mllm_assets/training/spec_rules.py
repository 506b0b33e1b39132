"""What cannot stand in a recipe: values out of range, and keys that contradict each other."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mllm_assets.training.templates import TEMPLATES

if TYPE_CHECKING:
    from mllm_assets.training.spec import TrainSpec


def split_names(text: str | None) -> tuple[str, ...]:
    """Split LLaMA-Factory's comma lists: `"a, b"` is `("a", "b")`, None and `""` are `()`."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


TRACKERS = ("mlflow", "wandb")

# Keys whose number must be above 0, and keys where it may be 0; null passes
_POSITIVE = """per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps cutoff_len lora_rank
    num_train_epochs image_min_pixels max_samples save_total_limit early_stopping_steps preprocessing_batch_size
    preprocessing_num_workers""".split()
_NOT_NEGATIVE = (
    """learning_rate weight_decay max_grad_norm warmup_steps seed eval_delay dataloader_num_workers""".split()
)


def problems(spec: "TrainSpec") -> Iterator[tuple[str, str]]:
    """What LLaMA-Factory, transformers or this engine would refuse: (key, message)."""
    yield from _range_problems(spec)
    yield from _conflicts(spec)
    yield from _data_problems(spec)
    yield from _evaluation_problems(spec)


def _range_problems(spec: "TrainSpec") -> Iterator[tuple[str, str]]:
    if spec.max_steps < -1:
        text = f"max_steps is {spec.max_steps}: expected a number of steps, or -1 for num_train_epochs. Change it."
        yield "max_steps", text
    for key in _POSITIVE:
        value = getattr(spec, key)
        if value is not None and value <= 0:
            yield key, f"{key} is {value}: expected a number above 0. Change it or delete the line."
    for key in _NOT_NEGATIVE:
        if getattr(spec, key) < 0:
            yield key, f"{key} is {getattr(spec, key)}: expected 0 or more. Change it or delete the line."
    for key in ("seed", "data_seed"):
        if (getattr(spec, key) or 0) >= 2**32:
            yield key, f"{key} is {getattr(spec, key)}: expected a number below 2**32, numpy's limit. Change it."
    if not 0 <= spec.lora_dropout < 1:
        yield "lora_dropout", f"lora_dropout is {spec.lora_dropout}: expected 0 or more and below 1. Change it."
    if spec.warmup_ratio is not None and not 0 <= spec.warmup_ratio <= 1:
        yield "warmup_ratio", f"warmup_ratio is {spec.warmup_ratio}: expected a share from 0 to 1. Change it."
    for kind in ("logging", "eval", "save"):
        steps = getattr(spec, f"{kind}_steps")
        if getattr(spec, f"{kind}_strategy") == "steps" and (steps <= 0 or (steps > 1 and steps != int(steps))):
            yield f"{kind}_steps", f"{kind}_steps is {steps}: expected a whole number or a share below 1. Change it."


def _conflicts(spec: "TrainSpec") -> Iterator[tuple[str, str]]:
    if not spec.do_train:
        yield "do_train", "do_train is false, LLaMA-Factory's default: this recipe trains nothing. Set do_train: true."
    if not spec.train_entries:
        yield "dataset", "dataset is empty. Name an entry of dataset_info.json, for example dataset: emoji_train."
    if spec.template not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        yield "template", f"template is {spec.template!r}: expected one of {known}. Set the one of the model's family."
    if spec.warmup_ratio and spec.warmup_steps:
        yield "warmup_ratio", "warmup_ratio and warmup_steps are both set, and versions differ in which wins. Keep one."
    if spec.image_max_pixels < spec.image_min_pixels:
        text = f"image_max_pixels is {spec.image_max_pixels}, below image_min_pixels {spec.image_min_pixels}. Raise it."
        yield "image_max_pixels", text
    if spec.bf16 and spec.fp16:
        yield "fp16", "bf16 and fp16 are both true. Keep one: bf16 where the GPU has it."
    for name in spec.trackers:
        if name not in TRACKERS:
            known = ", ".join(("none", "tensorboard", *TRACKERS))
            yield "report_to", f"report_to names {name!r}: expected of {known}. Change it or delete the line."
    if spec.quantization_bit and spec.finetuning_type != "lora":
        text = f"quantization_bit leaves only adapters to train, and finetuning_type is {spec.finetuning_type}. "
        yield "quantization_bit", f"{text}Set finetuning_type: lora, or delete quantization_bit."
    if spec.quantization_bit and (spec.fsdp or spec.deepspeed):
        text = "quantization_bit holds the whole model on each device, and fsdp or deepspeed spreads it. Delete one."
        yield "quantization_bit", text
    if spec.fsdp and spec.deepspeed:
        yield "deepspeed", "fsdp and deepspeed are both set, and a model is spread in one way only. Delete one."
    if spec.fsdp_config and not spec.fsdp:
        yield "fsdp_config", "fsdp_config is set but fsdp is not, so that nothing is spread. Set fsdp: true."
    if isinstance(spec.fsdp_config, dict):
        version = spec.fsdp_config.get("version", spec.fsdp_config.get("fsdp_version", 2))
        if str(version) != "2":
            text = f"fsdp_config asks for FSDP {version}, which PyTorch has replaced. Set version: 2 or delete it."
            yield "fsdp_config", text
    if spec.dataloader_prefetch_factor is not None and spec.dataloader_num_workers == 0:
        key = "dataloader_prefetch_factor"
        yield key, f"{key} needs loader processes, and dataloader_num_workers is 0. Set that or delete this line."


def _data_problems(spec: "TrainSpec") -> Iterator[tuple[str, str]]:
    if spec.mask_history and spec.train_on_prompt:
        text = "mask_history supervises the last answer only and train_on_prompt the questions too. Keep one."
        yield "mask_history", text
    if spec.val_size and spec.eval_entries:
        yield "val_size", "val_size and eval_dataset are both set, and there is one evaluation set. Keep one."
    if not (spec.val_size == 0 or 0 < spec.val_size < 1 or spec.val_size >= 2):
        text = f"val_size is {spec.val_size}: expected a share above 0 and below 1, or a number of rows from 2."
        yield "val_size", f"{text} Change it."
    if spec.interleave_probs is None:
        return
    if spec.mix_strategy == "concat":
        text = "interleave_probs says how often to draw from each entry, and mix_strategy is concat. Set mix_strategy: "
        yield "interleave_probs", f"{text}interleave_under or interleave_over, or delete the line."
    try:
        probabilities = spec.probabilities or []
    except ValueError:
        text = f"interleave_probs is {spec.interleave_probs!r}: expected numbers such as 0.7,0.3. Correct it."
        yield "interleave_probs", text
        return
    if not all(p >= 0 for p in probabilities) or abs(sum(probabilities) - 1) > 1e-8:
        text = f"interleave_probs is {spec.interleave_probs}: expected shares that sum to 1. Correct them."
        yield "interleave_probs", text
    for key, entries in (("dataset", spec.train_entries), ("eval_dataset", spec.eval_entries)):
        if entries and len(entries) != len(probabilities):
            text = (
                f"interleave_probs has {len(probabilities)} numbers, and {key} {len(entries)} entries. Give one each."
            )
            yield "interleave_probs", text


def _evaluation_problems(spec: "TrainSpec") -> Iterator[tuple[str, str]]:
    if spec.eval_strategy != "no" and not spec.evaluates:
        text = (
            f"eval_strategy is {spec.eval_strategy} but there is no eval_dataset. Name an entry of dataset_info.json."
        )
        yield "eval_strategy", text
    for key in ("load_best_model_at_end", "early_stopping_steps"):
        if getattr(spec, key) and spec.eval_strategy == "no":
            yield key, f"{key} needs evaluation during training. Set eval_strategy: steps and name an eval_dataset."
    if spec.lr_scheduler_type == "reduce_lr_on_plateau" and spec.eval_strategy == "no":
        yield "lr_scheduler_type", "reduce_lr_on_plateau needs evaluation during training. Set eval_strategy: steps."
    if spec.early_stopping_steps and spec.metric_for_best_model is None:
        yield "early_stopping_steps", "early_stopping_steps needs a metric to watch. Set metric_for_best_model: loss."
    metric = spec.metric_for_best_model
    if metric not in (None, "loss", "eval_loss"):
        yield (
            "metric_for_best_model",
            f"metric_for_best_model is {metric!r}: only the loss is measured. Set it to loss.",
        )
    if not spec.load_best_model_at_end or spec.save_strategy == "best":
        return
    if spec.eval_strategy != spec.save_strategy:
        found = f"eval_strategy is {spec.eval_strategy}, save_strategy {spec.save_strategy}"
        yield "load_best_model_at_end", f"load_best_model_at_end needs equal strategies: {found}. Make them the same."
    elif spec.eval_strategy == "steps" and not _is_multiple(spec.save_steps, spec.eval_steps or 0):
        found = f"save_steps {spec.save_steps} is not a multiple of eval_steps {spec.eval_steps}"
        yield "save_steps", f"load_best_model_at_end needs an evaluation at each checkpoint: {found}. Change one."


def _is_multiple(value: float, of: float) -> bool:
    if (value < 1) != (of < 1):
        return False
    return round(value * 1_000_000) % round(of * 1_000_000) == 0
