"""Keys that have no effect beside the recipe's other keys, and entries named twice: said before the run starts."""

from collections import Counter
from collections.abc import Collection, Iterator

from mllm_assets.training.spec import TrainSpec
from mllm_assets.training.templates import TEMPLATES

METHOD_KEYS = {
    "lora": ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_rslora", "use_dora"),
    "freeze": ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
}


def idle_notes(spec: TrainSpec, written: Collection[str]) -> Iterator[str]:
    """Yield a sentence for each written key that the recipe's other keys leave without effect."""
    for key, why in _reasons(spec):
        if key in written:
            yield f"{key} has no effect: {why}."


def repeated_notes(spec: TrainSpec) -> Iterator[str]:
    """Yield a sentence for each entry that stands more than once in its list, which LLaMA-Factory takes as well."""
    for key, names in (("dataset", spec.train_entries), ("eval_dataset", spec.eval_entries)):
        for name, count in Counter(names).items():
            if count > 1:
                yield f"{key} names {name} {count} times: each of its rows is read {count} times."


def _reasons(spec: TrainSpec) -> Iterator[tuple[str, str]]:
    for method, keys in METHOD_KEYS.items():
        if spec.finetuning_type != method:
            yield from ((key, f"finetuning_type is {spec.finetuning_type}, not {method}") for key in keys)
    if spec.finetuning_type == "lora" and not spec.freeze_multi_modal_projector:
        yield "freeze_multi_modal_projector", "LoRA trains adapters only, and the projector gets none"
    if spec.quantization_bit is None:
        for key in ("quantization_type", "double_quantization"):
            yield key, "quantization_bit is not set, so nothing is quantised"
    elif spec.quantization_bit != 4:
        for key in ("quantization_type", "double_quantization"):
            yield key, f"quantization_bit is {spec.quantization_bit}, and only 4 bits have kinds"
    if not spec.packs:
        for key in ("preprocessing_num_workers", "preprocessing_batch_size"):
            yield key, "rows are encoded while they are read, and nothing is cached"
    if len(spec.train_entries) == 1 and len(spec.eval_entries) < 2:
        for key in ("mix_strategy", "interleave_probs"):
            yield key, "there is one entry, and nothing to mix"
    if spec.max_steps > 0:
        yield "num_train_epochs", "max_steps is set and wins"
    if spec.disable_shuffling and spec.train_sampling_strategy != "random":
        yield "train_sampling_strategy", "disable_shuffling is set and wins"
    for kind in ("eval", "save", "logging"):
        strategy = getattr(spec, f"{kind}_strategy")
        if strategy != "steps":
            yield f"{kind}_steps", f"{kind}_strategy is {strategy}"
    if spec.eval_strategy == "no":
        for key in ("per_device_eval_batch_size", "eval_delay", "eval_on_start"):
            yield key, "eval_strategy is no, so nothing is evaluated while training"
        if spec.val_size:
            yield "val_size", "eval_strategy is no: its rows are held out all the same, and not evaluated"
    if not spec.evaluation_selects:
        for key in ("metric_for_best_model", "greater_is_better"):
            yield key, "evaluation does not choose the weights"
    if TEMPLATES[spec.template].thought is None:
        yield "enable_thinking", f"the template {spec.template} has no place for reasoning"
        yield "preserve_thinking", f"the template {spec.template} has no place for reasoning"
    elif not spec.mask_history:
        yield "preserve_thinking", "no history is masked, so all reasoning stays"
