"""`TrainSpec`: what a LLaMA-Factory recipe asks of a training run, under its key names and with its defaults.

Defaults: llamafactory 0.9.5 (`hparams/`), and `Seq2SeqTrainingArguments` of transformers 5.23 for the keys that it
inherits. A key of LLaMA-Factory that is not a field here is in `keys.py`, with the reason.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mllm_assets.errors import RecipeError, all_of
from mllm_assets.families.family import TEMPLATES
from mllm_assets.recipe.answer_metrics import UNTRIED, answer_metrics, answer_problems
from mllm_assets.recipe.asking import (
    CUTOFF_LEN,
    IMAGE_MAX_PIXELS,
    IMAGE_MIN_PIXELS,
    VIDEO_FPS,
    VIDEO_MAX_PIXELS,
    VIDEO_MAXLEN,
    VIDEO_MIN_PIXELS,
    TurnSettings,
)
from mllm_assets.recipe.method_keys import (
    ADDED,
    HF_ADDED,
    HF_OPERATIONAL,
    HF_SELECTION,
    HF_SEMANTIC,
    OPERATIONAL,
    SEMANTIC,
    method_problems,
    split_names,
)
from mllm_assets.recipe.output_dirs import output_dir_problems
from mllm_assets.recipe.preference_keys import PreferenceKeys, preference_problems
from mllm_assets.recipe.ranges import range_problems
from mllm_assets.recipe.reward_keys import reward_problems
from mllm_assets.recipe.vocabulary_keys import vocabulary_problems

LrScheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop",
    "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
]  # fmt: skip
Strategy = Literal["no", "steps", "epoch"]
MixStrategy = Literal["concat", "interleave_under", "interleave_over", "interleave_once"]
Compiler = Literal["inductor", "aot_eager", "eager"]
SamplingStrategy = Literal["random", "sequential", "group_by_length"]
TRACKERS = ("mlflow", "wandb")


class InvalidValueError(RecipeError):
    """Values are invalid. Carries each key with its text, so that the loader can name the lines."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__(all_of(text for _, text in problems))
        self.problems = problems


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec(PreferenceKeys):
    """A validated recipe. Comma lists stay strings, as LLaMA-Factory writes them; read them with `split_names`."""

    # model
    model_name_or_path: str = field(metadata=OPERATIONAL)  # its content is hashed, not its path
    disable_gradient_checkpointing: bool = field(default=False, metadata=OPERATIONAL)
    torch_compile: bool = field(default=False, metadata=ADDED)  # of the text layers: sums in another order
    torch_compile_backend: Compiler | None = field(default=None, metadata=ADDED)
    enable_liger_kernel: bool = field(default=False, metadata=ADDED)  # of the text layers too
    pure_bf16: bool = field(default=False, metadata=SEMANTIC)
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2"] = field(default="auto", metadata=ADDED)
    # data
    dataset: str = field(metadata=OPERATIONAL)  # the entries' content is hashed, not their names
    eval_dataset: str | None = field(default=None, metadata=OPERATIONAL)
    dataset_dir: str = field(default="data", metadata=OPERATIONAL)
    media_dir: str | None = field(default=None, metadata=OPERATIONAL)  # the images' content is hashed
    template: str = field(metadata=SEMANTIC)
    default_system: str | None = field(default=None, metadata=ADDED)  # for rows without a system message
    enable_thinking: bool | None = field(default=True, metadata=SEMANTIC)
    preserve_thinking: bool = field(default=False, metadata=SEMANTIC)
    cutoff_len: int = field(default=CUTOFF_LEN, metadata=SEMANTIC)
    max_samples: int | None = field(default=None, metadata=SEMANTIC)
    mix_strategy: MixStrategy = field(default="concat", metadata=SEMANTIC)
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
    image_do_pan_and_scan: bool = field(default=False, metadata=ADDED)
    crop_to_patches: bool = field(default=False, metadata=ADDED)
    video_fps: float = field(default=VIDEO_FPS, metadata=ADDED)
    video_maxlen: int = field(default=VIDEO_MAXLEN, metadata=ADDED)
    video_max_pixels: int = field(default=VIDEO_MAX_PIXELS, metadata=ADDED)
    video_min_pixels: int = field(default=VIDEO_MIN_PIXELS, metadata=ADDED)
    disable_shuffling: bool = field(default=False, metadata=SEMANTIC)
    dataloader_num_workers: int = field(default=0, metadata=HF_OPERATIONAL)
    dataloader_pin_memory: bool = field(default=True, metadata=HF_OPERATIONAL)
    dataloader_persistent_workers: bool = field(default=False, metadata=HF_OPERATIONAL)
    dataloader_prefetch_factor: int | None = field(default=None, metadata=HF_OPERATIONAL)
    dataloader_drop_last: bool = field(default=False, metadata=HF_SEMANTIC)
    train_sampling_strategy: SamplingStrategy = field(default="random", metadata=HF_SEMANTIC)
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
    label_smoothing_factor: float = field(default=0.0, metadata=ADDED)
    neftune_noise_alpha: float | None = field(default=None, metadata=HF_ADDED)
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
    eval_on_each_dataset: bool = field(default=False, metadata=OPERATIONAL)  # which of them chooses is in the metric
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
    # true or null: the newest checkpoint of the run itself; a path: also the run's name covers what is there
    resume_from_checkpoint: bool | str | None = field(default=None, metadata=OPERATIONAL)

    def __post_init__(self) -> None:
        # The defaults that LLaMA-Factory and transformers derive from other keys
        if not self.lora_alpha:
            object.__setattr__(self, "lora_alpha", 2 * self.lora_rank)
        if self.eval_strategy == "steps" and not self.eval_steps:
            object.__setattr__(self, "eval_steps", self.logging_steps)
        needs_metric = self.load_best_model_at_end or self.lr_scheduler_type == "reduce_lr_on_plateau"
        if needs_metric and self.metric_for_best_model is None:
            object.__setattr__(self, "metric_for_best_model", "loss")
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            object.__setattr__(self, "greater_is_better", self._higher_is_better)
        # What LLaMA-Factory, transformers or this engine would refuse
        groups = (
            method_problems,
            vocabulary_problems,
            preference_problems,
            reward_problems,
            range_problems,
            _conflicts,
            _data_problems,
            _evaluation_problems,
        )
        problems = [problem for find_problems in groups for problem in find_problems(self)]
        if problems := [*output_dir_problems(self.output_dir), *problems]:
            raise InvalidValueError(problems)

    @property
    def train_entries(self) -> tuple[str, ...]:
        """Names in `dataset_info.json` to train on, in the recipe's order."""
        return split_names(self.dataset)

    @property
    def trackers(self) -> tuple[str, ...]:
        """What `report_to` names besides TensorBoard, which is always written."""
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
        """Most tokens of a row: one less where rows are packed, as in LLaMA-Factory."""
        return self.cutoff_len - self.packs

    @property
    def turns(self) -> TurnSettings:
        """How the trained model is asked; see `row_cutoff_len` for what trains it."""
        return TurnSettings.of(self.to_dict())

    @property
    def uses_bitsandbytes_optimizer(self) -> bool:
        """Whether the optimizer's states are bitsandbytes'."""
        return not self.use_muon and ("8bit" in self.optim or "paged" in self.optim)

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate."""
        return bool(self.eval_entries) or self.val_size > 0

    @property
    def evaluates_each(self) -> bool:
        """Whether each evaluation entry has a loss of its own."""
        return self.eval_on_each_dataset and bool(self.eval_entries) and self.eval_strategy != "no"

    @property
    def answer_metric(self) -> str | None:
        """The metric of answers by which the best is chosen; None where it is a loss."""
        name = (self.metric_for_best_model or "loss").removeprefix("eval_")
        return None if name.endswith("loss") else name

    @property
    def measures_answers(self) -> bool:
        """Whether the model answers at each evaluation while it trains."""
        return self.eval_strategy != "no" and self.answer_metric is not None

    @property
    def _higher_is_better(self) -> bool:
        return self.answer_metric is not None and answer_metrics().get(self.answer_metric, True)

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
        names = [f.name for f in dataclasses.fields(self) if f.metadata["hf"] and f.name not in left_out]
        values = {name: getattr(self, name) for name in names}
        if self.warmup_ratio:
            values["warmup_steps"] = self.warmup_ratio
        if isinstance(self.fsdp, str):
            values["fsdp"] = self.fsdp.replace(",", " ")  # the older form, "full_shard auto_wrap"
        for name in ("fsdp_config", "deepspeed"):
            values[name] = copy.deepcopy(values[name])  # transformers writes into it
        return values

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values of all fields; `TrainSpec(**values)` reads them back."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


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
    if spec.video_max_pixels < spec.video_min_pixels:
        text = f"video_max_pixels is {spec.video_max_pixels}, below video_min_pixels {spec.video_min_pixels}. Raise it."
        yield "video_max_pixels", text
    if spec.bf16 and spec.fp16:
        yield "fp16", "bf16 and fp16 are both true. Keep one: bf16 where the GPU has it."
    for name in spec.trackers:
        if name not in TRACKERS:
            known = ", ".join(("none", "tensorboard", *TRACKERS))
            yield "report_to", f"report_to names {name!r}: expected of {known}. Change it or delete the line."
    if spec.quantization_bit and (spec.fsdp or spec.deepspeed):
        text = "quantization_bit holds the complete model on each device, and fsdp or deepspeed spreads it. Delete one."
        yield "quantization_bit", text
    for key in ("fsdp", "deepspeed", "quantization_bit"):
        if spec.torch_compile and getattr(spec, key):
            yield "torch_compile", f"torch_compile together with {key} has not been tried. Delete one."
    for key in ("torch_compile", "fsdp", "deepspeed"):
        if spec.enable_liger_kernel and getattr(spec, key):
            yield "enable_liger_kernel", f"enable_liger_kernel together with {key} has not been tried. Delete one."
    for key in ("fsdp", "deepspeed"):
        if spec.uses_bitsandbytes_optimizer and getattr(spec, key):
            yield "optim", f"optim: {spec.optim} together with {key} has not been tried. Set optim: adamw_torch_fused."
        if spec.use_muon and getattr(spec, key):
            yield "use_muon", f"use_muon together with {key} has not been tried. Delete one."
    if spec.torch_compile_backend and not spec.torch_compile:
        yield "torch_compile_backend", "torch_compile_backend is set, and nothing is compiled. Set torch_compile: true."
    if spec.fsdp and spec.deepspeed:
        yield "deepspeed", "fsdp and deepspeed are both set, and a model is spread in one way only. Delete one."
    if spec.fsdp_config and not spec.fsdp:
        yield "fsdp_config", "fsdp_config is set but fsdp is not, so that nothing is spread. Set fsdp: true."
    if isinstance(spec.fsdp_config, dict):
        version = spec.fsdp_config.get("version", spec.fsdp_config.get("fsdp_version", 2))
        if str(version) != "2":
            text = f"fsdp_config asks for FSDP {version}, which PyTorch has replaced. Set version: 2 or delete it."
            yield "fsdp_config", text
    if spec.neat_packing and spec.flash_attn not in ("auto", "sdpa"):
        text = "neat_packing keeps rows apart with masks that only PyTorch's sdpa reads, and flash_attn is "
        yield "flash_attn", f"{text}{spec.flash_attn}. Set flash_attn: auto."
    if spec.dataloader_prefetch_factor is not None and spec.dataloader_num_workers == 0:
        key = "dataloader_prefetch_factor"
        yield key, f"{key} needs loader processes, and dataloader_num_workers is 0. Set that or delete this line."


def _data_problems(spec: TrainSpec) -> Iterator[tuple[str, str]]:
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
            text = f"interleave_probs has {len(probabilities)} numbers, and {key} {len(entries)} entries."
            yield "interleave_probs", f"{text} Give one each."


def _evaluation_problems(spec: TrainSpec) -> Iterator[tuple[str, str]]:
    if spec.eval_strategy != "no" and not spec.evaluates:
        text = f"eval_strategy is {spec.eval_strategy} but there is no eval_dataset."
        yield "eval_strategy", f"{text} Name an entry of dataset_info.json."
    for key in ("load_best_model_at_end", "early_stopping_steps"):
        if getattr(spec, key) and spec.eval_strategy == "no":
            yield key, f"{key} needs evaluation during training. Set eval_strategy: steps and name an eval_dataset."
    if spec.lr_scheduler_type == "reduce_lr_on_plateau" and spec.eval_strategy == "no":
        yield "lr_scheduler_type", "reduce_lr_on_plateau needs evaluation during training. Set eval_strategy: steps."
    if spec.early_stopping_steps and spec.metric_for_best_model is None:
        yield "early_stopping_steps", "early_stopping_steps needs a metric to watch. Set metric_for_best_model: loss."
    metric = spec.metric_for_best_model
    if spec.eval_on_each_dataset and spec.eval_entries:
        measured = [f"eval_{name}_loss" for name in spec.eval_entries]
        if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in measured:
            text = f"metric_for_best_model is {metric!r}, and eval_on_each_dataset measures {', '.join(measured)}."
            yield "metric_for_best_model", f"{text} Set it to the one that chooses."
    elif spec.answer_metric is not None:
        untried = [key for key in UNTRIED if getattr(spec, key)] + ["stage"] * spec.learns_scores
        yield from answer_problems(spec.answer_metric, holds_rows_out=bool(spec.val_size), untried=untried)
    elif metric not in (None, "loss", "eval_loss"):
        text = f"metric_for_best_model is {metric!r}, and the loss on all of eval_dataset is one. Set it to loss."
        yield "metric_for_best_model", text
    if metric is not None and spec.greater_is_better != spec._higher_is_better:
        found, which = ("false", "higher") if spec._higher_is_better else ("true", "lower")
        text = f"greater_is_better is {found}, and a {which} {metric.removeprefix('eval_')} is better. Delete the line."
        yield "greater_is_better", text
    if not spec.load_best_model_at_end or spec.save_strategy == "best":
        return
    if spec.eval_strategy != spec.save_strategy:
        found = f"eval_strategy is {spec.eval_strategy}, save_strategy {spec.save_strategy}"
        yield "load_best_model_at_end", f"load_best_model_at_end needs equal strategies: {found}. Make them the same."
    elif spec.eval_strategy == "steps" and not _is_multiple(spec.save_steps, spec.eval_steps or 0):
        found = f"save_steps {spec.save_steps} is not a multiple of eval_steps {spec.eval_steps}"
        yield "save_steps", f"load_best_model_at_end needs an evaluation at each checkpoint: {found}. Change one."


def _is_multiple(value: float, of: float) -> bool:
    return (value < 1) == (of < 1) and round(value * 1_000_000) % round(of * 1_000_000) == 0
