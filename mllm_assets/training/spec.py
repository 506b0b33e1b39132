"""`TrainSpec`: what a LLaMA-Factory recipe asks of a training run, under its key names and with its defaults.

Defaults: llamafactory 0.9.5 (`hparams/`), and `Seq2SeqTrainingArguments` of transformers 5.23 for the keys that it
inherits. A key of LLaMA-Factory that is not a field here is in `keys.py`, with the reason.
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mllm_assets.errors import RecipeError
from mllm_assets.training.spec_rules import problems, split_names

# also where no recipe says anything: a published model is asked, an image is served
CUTOFF_LEN = 2048
IMAGE_MAX_PIXELS = 768 * 768
IMAGE_MIN_PIXELS = 32 * 32

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
    use_rslora: bool = field(default=False, metadata=SEMANTIC)
    use_dora: bool = field(default=False, metadata=SEMANTIC)
    disable_gradient_checkpointing: bool = field(default=False, metadata=OPERATIONAL)
    pure_bf16: bool = field(default=False, metadata=SEMANTIC)
    quantization_bit: Literal[4, 8] | None = field(default=None, metadata=SEMANTIC)
    quantization_type: Literal["nf4", "fp4"] = field(default="nf4", metadata=SEMANTIC)
    double_quantization: bool = field(default=True, metadata=SEMANTIC)
    # data
    dataset: str = field(metadata=OPERATIONAL)  # the entries' content is hashed, not their names
    eval_dataset: str | None = field(default=None, metadata=OPERATIONAL)
    dataset_dir: str = field(default="data", metadata=OPERATIONAL)
    template: str = field(metadata=SEMANTIC)
    enable_thinking: bool | None = field(default=True, metadata=SEMANTIC)
    preserve_thinking: bool = field(default=False, metadata=SEMANTIC)
    cutoff_len: int = field(default=CUTOFF_LEN, metadata=SEMANTIC)
    max_samples: int | None = field(default=None, metadata=SEMANTIC)
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = field(
        default="concat", metadata=SEMANTIC
    )
    interleave_probs: str | None = field(default=None, metadata=SEMANTIC)
    val_size: float = field(default=0.0, metadata=SEMANTIC)
    train_on_prompt: bool = field(default=False, metadata=SEMANTIC)
    mask_history: bool = field(default=False, metadata=SEMANTIC)
    packing: bool | None = field(default=None, metadata=SEMANTIC)
    neat_packing: bool = field(default=False, metadata=SEMANTIC)
    preprocessing_batch_size: int = field(default=1000, metadata=SEMANTIC)  # rows that are packed together
    preprocessing_num_workers: int | None = field(default=None, metadata=SEMANTIC)
    image_max_pixels: int = field(default=IMAGE_MAX_PIXELS, metadata=SEMANTIC)
    image_min_pixels: int = field(default=IMAGE_MIN_PIXELS, metadata=SEMANTIC)
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
    report_to: str | list[str] | None = field(default="none", metadata=OPERATIONAL)
    run_name: str | None = field(default=None, metadata=HF_OPERATIONAL)
    # distribution
    ddp_timeout: int = field(default=1800, metadata=HF_OPERATIONAL)
    ddp_backend: str | None = field(default=None, metadata=HF_OPERATIONAL)
    ddp_bucket_cap_mb: int | None = field(default=None, metadata=HF_OPERATIONAL)
    ddp_find_unused_parameters: bool | None = field(default=None, metadata=HF_OPERATIONAL)
    fsdp: bool | str | None = field(default=None, metadata=HF_SEMANTIC)  # sums in another order: other last bits
    fsdp_config: dict[str, Any] | str | None = field(default=None, metadata=HF_SEMANTIC)
    deepspeed: dict[str, Any] | str | None = field(default=None, metadata=HF_SEMANTIC)
    # true or null: the newest checkpoint of the run itself; a path: also the run's name covers what lies there
    resume_from_checkpoint: bool | str | None = field(default=None, metadata=OPERATIONAL)

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
        for key, text in problems(self):
            raise InvalidValueError(key, text)

    @property
    def train_entries(self) -> tuple[str, ...]:
        """Names in `dataset_info.json` to train on, in the recipe's order."""
        return split_names(self.dataset)

    @property
    def trackers(self) -> tuple[str, ...]:
        """What `report_to` names beside TensorBoard, which is always written."""
        names = split_names(self.report_to) if isinstance(self.report_to, str) else tuple(self.report_to or ())
        return tuple(name for name in names if name not in ("none", "tensorboard"))

    @property
    def eval_entries(self) -> tuple[str, ...]:
        return split_names(self.eval_dataset)

    @property
    def probabilities(self) -> list[float] | None:
        """How often each entry is drawn from; None to take turns."""
        return None if self.interleave_probs is None else [float(part) for part in split_names(self.interleave_probs)]

    @property
    def packs(self) -> bool:
        """Whether several rows share one sequence."""
        return bool(self.packing or self.neat_packing)

    @property
    def row_cutoff_len(self) -> int:
        """Most tokens of a row: one less where rows are packed, as LLaMA-Factory has it."""
        return self.cutoff_len - self.packs

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate."""
        return bool(self.eval_entries) or self.val_size > 0

    @property
    def evaluation_selects(self) -> bool:
        """Whether evaluation decides which weights come out: best model, early stop, or a plateau schedule."""
        return (
            self.load_best_model_at_end
            or self.early_stopping_steps is not None
            or self.lr_scheduler_type == "reduce_lr_on_plateau"
        )

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
        if isinstance(self.fsdp, str):
            values["fsdp"] = self.fsdp.replace(",", " ")  # the older form, "full_shard auto_wrap"
        for name in ("fsdp_config", "deepspeed"):
            values[name] = copy.deepcopy(values[name])  # transformers writes into it
        return values

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values of all fields; `from_dict` reads them back."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainSpec":
        return cls(**values)
