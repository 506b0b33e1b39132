"""transformers' `Trainer` with the recipe's arguments, LLaMA-Factory's loss and this project's reporting."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.training_args import ParallelMode

from mllm_assets.errors import MachineError, RecipeError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches.prepare import Setup
from mllm_assets.training.encoding.collate import OTHERS
from mllm_assets.training.encoding.row import EncodedRow
from mllm_assets.training.loop import delta_trainer, reporting
from mllm_assets.training.loop.checkpoints import Resumable, require_same_conditions
from mllm_assets.training.loop.delta_trainer import DeltaTrainer
from mllm_assets.training.loop.learning_rates import LearningRates
from mllm_assets.training.loop.muon import Muon
from mllm_assets.training.loop.optimizers import keep_embeddings_in_32_bits
from mllm_assets.training.loop.packed_rows import rows_apart
from mllm_assets.training.loop.padding import PaddingCount
from mllm_assets.training.loop.reporting import resume_line
from mllm_assets.training.models import freezing
from mllm_assets.training.models.device import out_of_memory_is_an_error
from mllm_assets.training.models.load import base_model, without_waiting_checks
from mllm_assets.training.runs.history import measured_losses
from mllm_assets.worker.protocol import num_ranks

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

Collate = Callable[[Sequence[EncodedRow]], dict[str, Any]]
SAMPLE_IDS, NUM_TOKENS, NUM_PADDING = "sample_ids", "num_tokens", "num_padding"


class Asks(Protocol):
    """Asks the model that trains, and leaves it and all that is drawn as they were."""

    def measure(self) -> dict[str, float]:
        """Metrics of its answers now, by name."""
        ...

    def describe(self) -> str:
        """What is measured, for the log."""
        ...


class FineTuner(DeltaTrainer):
    """`DeltaTrainer` with LLaMA-Factory's loss and a stop before a step that is not finite.

    Attributes:
        has_other_length: Whether it resumes a run of another number of steps.
        rates: What learns at which rate.
        answers: Measures answers at each evaluation; None where only losses are measured.
        measured: The names of its metrics.
    """

    has_other_length = False
    rates: LearningRates | None = None
    answers: Asks | None = None
    measured: tuple[str, ...] = ()
    padding: PaddingCount

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The loss under accumulation is the mean of micro-batch means, as LLaMA-Factory computes it for images
        self.model_accepts_loss_kwargs = False
        self._batches: list[tuple[list[str], torch.Tensor]] = []  # of the step that is being computed
        self._num_tokens = 0  # of these batches
        self._logged_loss = torch.zeros(())  # of the steps since the last line of the log
        self._skipped_steps = reporting.SkippedSteps()
        self.padding = PaddingCount()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        sample_ids = inputs.pop(SAMPLE_IDS)
        num_tokens = inputs.pop(NUM_TOKENS)
        self._num_tokens += num_tokens
        self.padding.add(num_tokens, inputs.pop(NUM_PADDING))
        size, steps = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        cure = (
            f"per_device_train_batch_size is {size}: set it to {max(1, size // 2)} and gradient_accumulation_steps to "
            f"{steps * 2}, which leaves the samples of a step as they are."
            if size > 1
            else "per_device_train_batch_size is 1 already: lower cutoff_len, or train less of the model."
        )
        with out_of_memory_is_an_error(f"in step {self.state.global_step + 1}", cure), without_waiting_checks():
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._batches.append((sample_ids, loss))
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        del inputs[SAMPLE_IDS], inputs[NUM_TOKENS], inputs[NUM_PADDING]
        cure = (
            f"per_device_eval_batch_size is {self.args.per_device_eval_batch_size}: lower it; the loss stays the same."
        )
        with out_of_memory_is_an_error("in the evaluation", cure), without_waiting_checks():
            return super().prediction_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "position_ids" in inputs and "attention_mask" not in inputs:
            inputs = {**inputs, **rows_apart(base_model(self.model), inputs)}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Each batch counts equally, a short last one too, as in `Seq2SeqTrainer`, which LLaMA-Factory uses
        self.gather_function = self.accelerator.gather
        return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.answers is not None and output.metrics is not None:
            output.metrics.update({f"{metric_key_prefix}_{name}": v for name, v in self.answers.measure().items()})
        return output

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return _by_length(self.train_dataset, self.args.train_batch_size * self.args.gradient_accumulation_steps)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _by_length(eval_dataset, self.args.eval_batch_size, torch.Generator().manual_seed(seed))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        trained = self.model if model is None else model
        if self.rates and self.rates.spec.use_muon and self.optimizer is None:
            self.optimizer = Muon([n for n in trained.named_parameters() if n[1].requires_grad], self.rates.spec)
        groups = self.rates and self.rates.groups(trained, self.get_decay_parameter_names(trained))
        if groups and self.optimizer is None:
            kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = kind(groups, **kwargs)
            if kwargs.get("optim_bits") == 8:
                keep_embeddings_in_32_bits(trained)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.args.lr_scheduler_type == "warmup_stable_decay":
            # LLaMA-Factory's shares where the recipe names none: a third of what follows the warm-up is stable
            num_left = num_training_steps - self.args.get_warmup_steps(num_training_steps)
            shares = {"num_stable_steps": num_left // 3, "num_decay_steps": num_left - num_left // 3}
            kwargs: Any = self.args.lr_scheduler_kwargs or {}
            self.args.lr_scheduler_kwargs = {**shares, **kwargs}
        if self.args.lr_scheduler_type == "reduce_lr_on_plateau" and self.args.greater_is_better:
            kwargs = self.args.lr_scheduler_kwargs or {}
            self.args.lr_scheduler_kwargs = {"mode": "max", **kwargs}
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if self.has_other_length and isinstance(schedule, LambdaLR):
            # the optimizer's rate for the next step is of the old schedule, at whose end it is 0
            schedule._last_lr = schedule.get_lr()
            for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
                group["lr"] = rate

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else torch.as_tensor(grad_norm)
        num_tokens: Any = self.accelerator.reduce(torch.tensor(self._num_tokens, device=self.args.device))
        found = torch.stack([*(loss for _, loss in self._batches), norm.to(self._batches[0][1])])
        # the one time in a step that the host waits for the device; numbers of tokens are exact in 64 bits
        *losses, norm, num_tokens = torch.cat([found.double(), num_tokens.double()[None]]).tolist()
        batches = [(ids, loss) for (ids, _), loss in zip(self._batches, losses, strict=True)]
        is_skipped = self.args.fp16 and self._skipped_steps.tolerates(norm)  # a loss has no scale to try
        reporting.check_finite(self.state.global_step + 1, batches, 0.0 if is_skipped else norm)
        for loss in losses:
            self._logged_loss += loss
        self.state.num_input_tokens_seen += int(num_tokens)
        self._batches, self._num_tokens = [], 0
        return norm

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Counted by the collator: the library's way waits for the device in each micro-batch."""

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if self.args.parallel_mode == ParallelMode.DISTRIBUTED:  # the mean over all processes
            super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
            return
        num_logged = self._globalstep_last_logged
        super()._maybe_log_save_evaluate(self._logged_loss, *args, **kwargs)  # known here already
        if self._globalstep_last_logged != num_logged:
            tr_loss.zero_()


def with_sample_ids(collator: Collate, rows: Sequence[EncodedRow]) -> dict[str, Any]:
    """Collate rows and add their ids and numbers of tokens, for messages and counts; they never reach the model."""
    num_tokens = sum(len(sequence.input_ids) for row in rows for sequence in row.sequences)
    batch: dict[str, Any] = {**collator(rows)}
    num_places = batch["labels"].numel() + (batch[OTHERS]["labels"].numel() if OTHERS in batch else 0)
    num_padding = num_places - num_tokens
    return {**batch, SAMPLE_IDS: [row.id for row in rows], NUM_TOKENS: num_tokens, NUM_PADDING: num_padding}


def _by_length(rows: Any, batch_size: int, generator: torch.Generator | None = None) -> LengthGroupedSampler:
    """Batches of rows of about one length; transformers finds lengths in mappings only."""
    return LengthGroupedSampler(batch_size, lengths=rows.counted("num_tokens").tolist(), generator=generator)


def require_distribution(spec: TrainSpec, reporter: "Reporter") -> None:
    """Refuse a way of spreading the model that cannot work here.

    Raises:
        MachineError: `fsdp` with one process, or `deepspeed` that is not installed.
    """
    if spec.fsdp and num_ranks() == 1:
        raise MachineError(
            "fsdp spreads the model over processes, and this run has one. Set num_processes of the accelerator "
            "(MLLM_ASSETS_NUM_PROCESSES, --num-processes) to 2 or more, or delete fsdp from the recipe."
        )
    if spec.deepspeed:
        if importlib.util.find_spec("deepspeed") is None:
            raise MachineError(
                "The recipe asks for deepspeed, which is not installed. Install it (pip install deepspeed), or delete "
                "the line: without it processes share the work with DDP, and fsdp: true spreads the model."
            )
        reporter.warn("deepspeed is passed to the library unchanged; it has not been tried with this engine on a GPU.")


def make_trainer(
    setup: Setup,
    run_dir: Path,
    trainable: freezing.TrainableSet,
    collator: Collate,
    resumable: Resumable,
    reporter: "Reporter",
    kind: Callable[..., FineTuner] = FineTuner,
) -> FineTuner:
    """Return a trainer with the recipe's arguments and this project's reporting."""
    args = _arguments(setup, run_dir, base_model(trainable.model))
    base_model(trainable.model).config.get_text_config().use_cache = False  # the top-level flag is not enough
    cure = "End other programs on the device, or train less of the model: finetuning_type: lora."
    with out_of_memory_is_an_error("while the model was put on the device", cure):
        trainer = kind(
            model=trainable.model,
            args=args,
            data_collator=partial(with_sample_ids, collator),
            train_dataset=setup.inputs.train_rows,  # pyright: ignore[reportArgumentType]
            eval_dataset=setup.inputs.eval_parts or setup.inputs.eval_rows or None,  # pyright: ignore[reportArgumentType]
            callbacks=_callbacks(setup, run_dir, args, resumable, reporter),
        )
    trainer.digests, trainer.measured = setup.inputs.digests, setup.measured
    trainer.rates = LearningRates(spec=setup.spec, family=trainable.family)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(setup: Setup, run_dir: Path, model: Any) -> TrainingArguments:
    spec, device, precision = setup.spec, setup.device, setup.precision
    values = spec.training_arguments()
    if not setup.inputs.eval_rows:
        values |= {"eval_strategy": "no", "load_best_model_at_end": False}
    if spec.fsdp:
        values["fsdp_config"] = delta_trainer.with_layers(values["fsdp_config"], model)
    if spec.disable_shuffling:
        values["train_sampling_strategy"] = "sequential"
    if device.kind == "cpu":
        values["dataloader_pin_memory"] = False
    values["run_name"] = spec.run_name or f"{run_dir.parent.name}/{run_dir.name}"
    tracker_names = reporting.start_trackers(spec, run_dir)
    args = TrainingArguments(
        **values,
        output_dir=str(run_dir),
        bf16=precision.autocast == "bf16",
        fp16=precision.autocast == "fp16",
        tf32=spec.tf32 if device.kind == "cuda" else None,
        use_cpu=device.kind == "cpu",
        activation_checkpointing=bool(setup.checkpointed),
        activation_checkpointing_kwargs={"use_reentrant": False},
        report_to=tracker_names or "none",
        disable_tqdm=True,
        log_level="error",
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        prediction_loss_only=True,
        include_num_input_tokens_seen="non_padding",
        label_names=["labels"],
    )
    if args.parallel_mode.value == "not_distributed":
        args._n_gpu = 1  # one process trains on one GPU: DataParallel would split a batch's images from its rows
    return args


def _callbacks(
    setup: Setup, run_dir: Path, args: TrainingArguments, resumable: Resumable, reporter: "Reporter"
) -> list[Any]:
    spec, samples = setup.spec, args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    log = reporting.RunLog(run_dir, reporter, num_samples_per_step=samples, measured=setup.measured)
    callbacks: list[Any] = [log]
    if spec.early_stopping_steps:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=spec.early_stopping_steps))
    if args.process_index == 0:
        callbacks.append(reporting.tensorboard_callback(run_dir, first_step=resumable.step))
        if spec.trackers:
            callbacks.append(reporting.TrackerRuns(run_dir, list(spec.trackers)))
    return callbacks


def run_training(trainer: FineTuner, resumable: Resumable, reporter: "Reporter") -> float | None:
    """Train to the end and return the mean loss of the steps done here, None if there were none."""
    cure = "Train less of the model: finetuning_type: lora, or freeze_language_model: true."
    with out_of_memory_is_an_error("outside of a batch, for gradients, optimizer or checkpoint", cure):
        if resumable.path is None:
            return trainer.train().training_loss
        require_same_conditions(resumable.path, trainer.conditions)
        state = TrainerState.load_from_json(str(resumable.path / "trainer_state.json"))
        num_steps = trainer.args.max_steps if trainer.args.max_steps > 0 else state.max_steps
        if state.global_step > num_steps:
            raise RecipeError(
                f"{resumable.path} was saved after step {state.global_step}, and max_steps is {num_steps}. Raise it, "
                f"or name an earlier checkpoint in resume_from_checkpoint."
            )
        reporter.notify(resume_line(resumable, num_steps, trainer.args.device.type))
        trainer.has_other_length = num_steps != state.max_steps
        if trainer.has_other_length:
            reporter.warn(
                f"{resumable.path.name} is of a run of {state.max_steps} steps, and this one has {num_steps}: from "
                f"here on the learning rate follows the schedule of {num_steps} steps."
            )
        if state.global_step < num_steps:
            return trainer.train(resume_from_checkpoint=str(resumable.path)).training_loss
        # Killed between the last step and the end of the run. `Trainer.train` would do one step too many.
        trainer._load_from_checkpoint(str(resumable.path))
        trainer.state = state
        if trainer.args.load_best_model_at_end and state.best_global_step:
            trainer._load_best_model()
        return None


def training_facts(
    trainer: FineTuner, train_loss: float | None, train_wall_s: float, resumable: Resumable
) -> dict[str, Any]:
    """Return what the steps gave: counts, throughput since the last resume, and the losses of the published model."""
    state, args = trainer.state, trainer.args
    published_step = (args.load_best_model_at_end and state.best_global_step) or state.global_step
    history = [line for line in state.log_history if line["step"] <= published_step]
    logged = {key: line[key] for line in history for key in ("loss", *measured_losses(line)) if key in line}
    chosen = (args.metric_for_best_model or "loss").removeprefix("eval_")
    asked = {name: line[f"eval_{name}"] for line in history for name in trainer.measured if f"eval_{name}" in line}
    rewards = [line["reward"] for line in history if "reward" in line]
    num_steps_here = state.global_step - resumable.step
    share = num_steps_here / state.global_step if state.global_step else 0.0
    num_samples = num_steps_here * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "num_steps": state.global_step,
        "published_step": published_step,
        "num_epochs": state.epoch,
        "final_loss": logged.pop("loss", train_loss),
        "eval_loss": logged.get("eval_loss" if chosen in trainer.measured else f"eval_{chosen}"),
        "eval_losses": {name: loss for name, loss in logged.items() if name != "eval_loss"},
        **({"eval_answers": asked} if asked else {}),
        **({"final_reward": rewards[-1]} if rewards else {}),
        "train_wall_s": train_wall_s,
        "samples_per_s": num_samples / train_wall_s,
        "tokens_per_s": float(state.num_input_tokens_seen) * share / train_wall_s,
        "padding_share": trainer.padding.share,
    }
