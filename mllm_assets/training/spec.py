"""`TrainSpec`: what a LLaMA-Factory recipe asks of a training run, under its key names and with its defaults.

Defaults: llamafactory 0.9.5 (`hparams/`), and `Seq2SeqTrainingArguments` of transformers 5.23 for the keys that it
inherits. A key of LLaMA-Factory that is not a field here is in `keys.py`, with the reason.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mllm_assets.errors import RecipeError
from mllm_assets.training.templates import TEMPLATES

# What a field is for. "semantic" fields decide which weights come out and are hashed into the run's name;
# "selection" fields do so only where evaluation picks the best model, stops the run or steers the learning rate;
# "operational" fields never do. `hf`: transformers' TrainingArguments has a field of that name.
SEMANTIC = {"scope": "semantic", "hf": False}
OPERATIONAL = {"scope": "operational", "hf": False}
HF_SEMANTIC = {"scope": "semantic", "hf": True}
HF_SELECTION = {"scope": "selection", "hf": True}
HF_OPERATIONAL = {"scope": "operational", "hf": True}

LrScheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]
Strategy = Literal["no", "steps", "epoch"]


class InvalidValueError(RecipeError):
    """One key's value cannot stand. Carries the key, so that the loader can name the line."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


def split_names(text: str | None) -> tuple[str, ...]:
    """Split LLaMA-Factory's comma lists: `"a, b"` is `("a", "b")`, None and `""` are `()`."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """A validated recipe. Comma lists stay strings, as LLaMA-Factory writes them; read them with `split_names`."""

    # model
    model_name_or_path: str = field(metadata=OPERATIONAL)  # its content is hashed, not its path
    finetuning_type: Literal["lora", "freeze", "full"] = field(default="lora", metadata=SEMANTIC)
    freeze_vision_tower: bool = field(default=True, metadata=SEMANTIC)
    freeze_multi_modal_projector: bool = field(default=True, metadata=SEMANTIC)
    freeze_language_model: bool = field(default=False, metadata=SEMANTIC)
    freeze_trainable_layers: int = field(default=2, metadata=SEMANTIC)
    freeze_trainable_modules: str = field(default="all", metadata=SEMANTIC)
    freeze_extra_modules: str | None = field(default=None, metadata=SEMANTIC)
    lora_rank: int = field(default=8, metadata=SEMANTIC)
    lora_alpha: int | None = field(default=None, metadata=SEMANTIC)  # becomes 2 * lora_rank
    lora_dropout: float = field(default=0.0, metadata=SEMANTIC)
    lora_target: str = field(default="all", metadata=SEMANTIC)
    disable_gradient_checkpointing: bool = field(default=False, metadata=OPERATIONAL)
    pure_bf16: bool = field(default=False, metadata=SEMANTIC)
    # data
    dataset: str = field(metadata=OPERATIONAL)  # the entries' content is hashed, not their names
    eval_dataset: str | None = field(default=None, metadata=OPERATIONAL)
    dataset_dir: str = field(default="data", metadata=OPERATIONAL)
    template: str = field(metadata=SEMANTIC)
    enable_thinking: bool | None = field(default=True, metadata=SEMANTIC)
    cutoff_len: int = field(default=2048, metadata=SEMANTIC)
    max_samples: int | None = field(default=None, metadata=SEMANTIC)
    image_max_pixels: int = field(default=768 * 768, metadata=SEMANTIC)
    image_min_pixels: int = field(default=32 * 32, metadata=SEMANTIC)
    disable_shuffling: bool = field(default=False, metadata=SEMANTIC)
    dataloader_num_workers: int = field(default=0, metadata=HF_OPERATIONAL)
    dataloader_pin_memory: bool = field(default=True, metadata=HF_OPERATIONAL)
    dataloader_persistent_workers: bool = field(default=False, metadata=HF_OPERATIONAL)
    dataloader_prefetch_factor: int | None = field(default=None, metadata=HF_OPERATIONAL)
    dataloader_drop_last: bool = field(default=False, metadata=HF_SEMANTIC)
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = field(
        default="random", metadata=HF_SEMANTIC
    )
    # optimisation
    do_train: bool = field(default=False, metadata=OPERATIONAL)
    per_device_train_batch_size: int = field(default=8, metadata=HF_SEMANTIC)
    gradient_accumulation_steps: int = field(default=1, metadata=HF_SEMANTIC)
    num_train_epochs: float = field(default=3.0, metadata=HF_SEMANTIC)
    max_steps: int = field(default=-1, metadata=HF_SEMANTIC)
    learning_rate: float = field(default=5e-5, metadata=HF_SEMANTIC)
    lr_scheduler_type: LrScheduler = field(default="linear", metadata=HF_SEMANTIC)
    lr_scheduler_kwargs: dict[str, Any] | None = field(default=None, metadata=HF_SEMANTIC)
    warmup_steps: float = field(default=0, metadata=HF_SEMANTIC)  # below 1: a share of all steps
    warmup_ratio: float | None = field(default=None, metadata=SEMANTIC)
    optim: Optimizer = field(default="adamw_torch_fused", metadata=HF_SEMANTIC)
    optim_args: str | None = field(default=None, metadata=HF_SEMANTIC)
    weight_decay: float = field(default=0.0, metadata=HF_SEMANTIC)
    adam_beta1: float = field(default=0.9, metadata=HF_SEMANTIC)
    adam_beta2: float = field(default=0.999, metadata=HF_SEMANTIC)
    adam_epsilon: float = field(default=1e-8, metadata=HF_SEMANTIC)
    max_grad_norm: float = field(default=1.0, metadata=HF_SEMANTIC)
    bf16: bool = field(default=False, metadata=HF_SEMANTIC)
    fp16: bool = field(default=False, metadata=HF_SEMANTIC)
    tf32: bool | None = field(default=None, metadata=HF_SEMANTIC)
    seed: int = field(default=42, metadata=HF_SEMANTIC)
    data_seed: int | None = field(default=None, metadata=HF_SEMANTIC)
    full_determinism: bool = field(default=False, metadata=HF_OPERATIONAL)
    use_cpu: bool = field(default=False, metadata=HF_OPERATIONAL)
    # evaluation during training
    eval_strategy: Strategy = field(default="no", metadata=HF_SELECTION)
    eval_steps: float | None = field(default=None, metadata=HF_SELECTION)
    eval_delay: float = field(default=0, metadata=HF_SELECTION)
    eval_on_start: bool = field(default=False, metadata=HF_OPERATIONAL)
    per_device_eval_batch_size: int = field(default=8, metadata=HF_SELECTION)
    load_best_model_at_end: bool = field(default=False, metadata=HF_SEMANTIC)
    metric_for_best_model: str | None = field(default=None, metadata=HF_SELECTION)
    greater_is_better: bool | None = field(default=None, metadata=HF_SELECTION)
    early_stopping_steps: int | None = field(default=None, metadata=SEMANTIC)
    # output and logs
    output_dir: str = field(default="trainer_output", metadata=OPERATIONAL)
    save_strategy: Literal["no", "steps", "epoch", "best"] = field(default="steps", metadata=HF_SELECTION)
    save_steps: float = field(default=500, metadata=HF_SELECTION)
    save_total_limit: int | None = field(default=None, metadata=HF_OPERATIONAL)
    logging_strategy: Strategy = field(default="steps", metadata=HF_OPERATIONAL)
    logging_steps: float = field(default=500, metadata=HF_OPERATIONAL)
    logging_first_step: bool = field(default=False, metadata=HF_OPERATIONAL)
    plot_loss: bool = field(default=False, metadata=OPERATIONAL)
    # distribution
    ddp_timeout: int = field(default=1800, metadata=HF_OPERATIONAL)
    ddp_backend: str | None = field(default=None, metadata=HF_OPERATIONAL)
    ddp_bucket_cap_mb: int | None = field(default=None, metadata=HF_OPERATIONAL)
    ddp_find_unused_parameters: bool | None = field(default=None, metadata=HF_OPERATIONAL)

    def __post_init__(self) -> None:
        # The defaults that LLaMA-Factory and transformers derive from other keys
        if not self.lora_alpha:
            object.__setattr__(self, "lora_alpha", 2 * self.lora_rank)
        if self.eval_strategy == "steps" and not self.eval_steps:
            object.__setattr__(self, "eval_steps", self.logging_steps)
        if (self.load_best_model_at_end or self.lr_scheduler_type == "reduce_lr_on_plateau") and (
            self.metric_for_best_model is None
        ):
            object.__setattr__(self, "metric_for_best_model", "loss")
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            object.__setattr__(self, "greater_is_better", not self.metric_for_best_model.endswith("loss"))
        for key, text in _problems(self):
            raise InvalidValueError(key, text)

    @property
    def train_entries(self) -> tuple[str, ...]:
        """Names in `dataset_info.json` to train on, in the recipe's order."""
        return split_names(self.dataset)

    @property
    def eval_entries(self) -> tuple[str, ...]:
        return split_names(self.eval_dataset)

    @property
    def evaluation_selects(self) -> bool:
        """Whether evaluation decides which weights come out: best model, early stop, or a plateau schedule."""
        return (
            self.load_best_model_at_end
            or self.early_stopping_steps is not None
            or self.lr_scheduler_type == "reduce_lr_on_plateau"
        )

    def semantic_values(self) -> dict[str, Any]:
        """The fields that decide which weights come out, for the run's fingerprint."""
        scopes = {"semantic", "selection"} if self.evaluation_selects else {"semantic"}
        other_methods = tuple({"lora_", "freeze_trainable_", "freeze_extra_"} - _PREFIXES[self.finetuning_type])
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.metadata["scope"] in scopes and not f.name.startswith(other_methods)
        }

    def training_arguments(self) -> dict[str, Any]:
        """Keyword arguments for transformers' `TrainingArguments`, without `output_dir`, precision or device.

        `warmup_ratio` has become `warmup_steps` below 1. `bf16`, `fp16`, `tf32`, `use_cpu` are left out: what the
        machine can do decides over them.
        """
        left_out = {"bf16", "fp16", "tf32", "use_cpu"}
        values = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.metadata["hf"] and f.name not in left_out
        }
        if self.warmup_ratio:
            values["warmup_steps"] = self.warmup_ratio
        return values

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values of all fields; `from_dict` reads them back."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainSpec":
        return cls(**values)


# Which keys are read by one way of fine-tuning only
_PREFIXES = {"lora": {"lora_"}, "freeze": {"freeze_trainable_", "freeze_extra_"}, "full": set[str]()}

# Keys whose number must be above 0, and keys where it may be 0; null passes
_POSITIVE = """per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps cutoff_len lora_rank
    num_train_epochs image_min_pixels max_samples save_total_limit early_stopping_steps""".split()
_NOT_NEGATIVE = (
    """learning_rate weight_decay max_grad_norm warmup_steps seed eval_delay dataloader_num_workers""".split()
)


def _problems(spec: TrainSpec) -> Iterator[tuple[str, str]]:
    """What LLaMA-Factory, transformers or this engine would refuse: (key, message)."""
    yield from _range_problems(spec)
    yield from _conflicts(spec)
    yield from _evaluation_problems(spec)


def _range_problems(spec: TrainSpec) -> Iterator[tuple[str, str]]:
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


def _conflicts(spec: TrainSpec) -> Iterator[tuple[str, str]]:
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
    if spec.dataloader_prefetch_factor is not None and spec.dataloader_num_workers == 0:
        key = "dataloader_prefetch_factor"
        yield key, f"{key} needs loader processes, and dataloader_num_workers is 0. Set that or delete this line."


def _evaluation_problems(spec: TrainSpec) -> Iterator[tuple[str, str]]:
    if spec.eval_strategy != "no" and not spec.eval_entries:
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
