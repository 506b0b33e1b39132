"""transformers' `Trainer` with the recipe's arguments, LLaMA-Factory's loss and this project's reporting."""

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from mllm_assets.errors import MachineError
from mllm_assets.training import freezing, memory, reporting, sharding, trackers
from mllm_assets.training.checkpoints import Resumable, require_same_conditions
from mllm_assets.training.collate import Collator
from mllm_assets.training.delta_trainer import DeltaTrainer
from mllm_assets.training.describing import resume_line
from mllm_assets.training.device import Device, Precision
from mllm_assets.training.encode import EncodedRow
from mllm_assets.training.inputs import Inputs
from mllm_assets.training.model import base_model
from mllm_assets.training.packed_attention import separate_rows
from mllm_assets.training.ranks import num_ranks
from mllm_assets.training.spec import TrainSpec

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter


SAMPLE_IDS = "sample_ids"


class FineTuner(DeltaTrainer):
    """`DeltaTrainer` with LLaMA-Factory's loss and a stop before a step that is not finite."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The loss under accumulation is the mean of micro-batch means, as LLaMA-Factory computes it for images
        self.model_accepts_loss_kwargs = False
        self._batches: list[tuple[list[str], torch.Tensor]] = []  # of the step that is being computed

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        sample_ids = inputs.pop(SAMPLE_IDS)
        size, steps = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        cure = (
            f"per_device_train_batch_size is {size}: set it to {max(1, size // 2)} and gradient_accumulation_steps to "
            f"{steps * 2}, which leaves the samples of a step as they are."
            if size > 1
            else "per_device_train_batch_size is 1 already: lower cutoff_len, or train less of the model."
        )
        with memory.out_of_memory_is_an_error(f"in step {self.state.global_step + 1}", cure):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._batches.append((sample_ids, loss))
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        del inputs[SAMPLE_IDS]
        cure = (
            f"per_device_eval_batch_size is {self.args.per_device_eval_batch_size}: lower it; the loss stays the same."
        )
        with memory.out_of_memory_is_an_error("in the evaluation", cure):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "position_ids" in inputs and "attention_mask" not in inputs:
            window = base_model(self.model).config.text_config.sliding_window
            masks = separate_rows(inputs["position_ids"], inputs["token_type_ids"], window)
            inputs = {**inputs, "attention_mask": masks}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Each batch counts alike, a short last one too, as in `Seq2SeqTrainer`, which LLaMA-Factory uses
        self.gather_function = self.accelerator.gather
        return super().evaluate(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return _by_length(self.train_dataset, self.args.train_batch_size * self.args.gradient_accumulation_steps)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _by_length(eval_dataset, self.args.eval_batch_size, torch.Generator().manual_seed(seed))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.args.lr_scheduler_type == "warmup_stable_decay":
            # LLaMA-Factory's shares where the recipe names none: a third of what follows the warm-up is stable
            num_left = num_training_steps - self.args.get_warmup_steps(num_training_steps)
            shares = {"num_stable_steps": num_left // 3, "num_decay_steps": num_left - num_left // 3}
            kwargs: Any = self.args.lr_scheduler_kwargs or {}
            self.args.lr_scheduler_kwargs = {**shares, **kwargs}
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.args.fp16:  # fp16's scaler skips such steps itself
            batches = [(sample_ids, float(loss)) for sample_ids, loss in self._batches]
            reporting.check_finite(self.state.global_step + 1, batches, float(grad_norm))
        self._batches.clear()
        return grad_norm


def with_sample_ids(collator: Collator, rows: Sequence[EncodedRow]) -> dict[str, Any]:
    """Collate rows and say which they are, for messages; the ids never reach the model."""
    return {**collator(rows), SAMPLE_IDS: [row.id for row in rows]}


def _by_length(rows: Any, batch_size: int, generator: torch.Generator | None = None) -> LengthGroupedSampler:
    """Batches of rows of about one length; transformers finds lengths in mappings only."""
    return LengthGroupedSampler(batch_size, lengths=[len(row.input_ids) for row in rows], generator=generator)


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
        reporter.warn("deepspeed is handed to the library as it is; it has not been tried with this engine on a GPU.")


def make_trainer(
    spec: TrainSpec,
    run_dir: Path,
    device: Device,
    precision: Precision,
    trainable: freezing.TrainableSet,
    inputs: Inputs,
    collator: Collator,
    resumable: Resumable,
    reporter: "Reporter",
) -> FineTuner:
    """Return a trainer with the recipe's arguments and this project's reporting."""
    values = spec.training_arguments()
    if not inputs.eval_rows:
        values |= {"eval_strategy": "no", "load_best_model_at_end": False}
    if spec.fsdp:
        values["fsdp_config"] = sharding.with_layers(values["fsdp_config"], base_model(trainable.model))
    if spec.disable_shuffling:
        values["train_sampling_strategy"] = "sequential"
    if device.kind == "cpu":
        values["dataloader_pin_memory"] = False
    values["run_name"] = spec.run_name or f"{run_dir.parent.name}/{run_dir.name}"
    tracker_names = trackers.start(spec, run_dir)
    args = TrainingArguments(
        **values,
        output_dir=str(run_dir),
        bf16=precision.autocast == "bf16",
        fp16=precision.autocast == "fp16",
        tf32=spec.tf32 if device.kind == "cuda" else None,
        use_cpu=device.kind == "cpu",
        activation_checkpointing=memory.checkpoints_activations(spec, device),
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
    base_model(trainable.model).config.text_config.use_cache = False  # the top-level flag is not enough
    samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    callbacks: list[Any] = [reporting.RunLog(run_dir, reporter, num_samples_per_step=samples)]
    if spec.early_stopping_steps:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=spec.early_stopping_steps))
    if args.process_index == 0:
        callbacks.append(reporting.tensorboard_callback(run_dir, first_step=resumable.step))
        if tracker_names:
            callbacks.append(trackers.KeepsRunIds(run_dir, tracker_names))
    trainer = FineTuner(
        model=trainable.model,
        args=args,
        data_collator=partial(with_sample_ids, collator),
        train_dataset=inputs.train_rows,  # pyright: ignore[reportArgumentType]
        eval_dataset=inputs.eval_rows or None,  # pyright: ignore[reportArgumentType]
        callbacks=callbacks,
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    return trainer


def run_training(trainer: FineTuner, resumable: Resumable, reporter: "Reporter") -> float | None:
    """Train to the end and return the mean loss of the steps done here; None where none was left to do."""
    cure = "Train less of the model: finetuning_type: lora, or freeze_language_model: true."
    with memory.out_of_memory_is_an_error("outside of a batch, for gradients, optimizer or checkpoint", cure):
        return _run_training(trainer, resumable, reporter)


def _run_training(trainer: FineTuner, resumable: Resumable, reporter: "Reporter") -> float | None:
    if resumable.path is None:
        return trainer.train().training_loss
    require_same_conditions(resumable.path, trainer.conditions)
    state = TrainerState.load_from_json(str(resumable.path / "trainer_state.json"))
    reporter.say(resume_line(resumable, state.max_steps, trainer.args.device.type))
    if state.global_step >= state.max_steps:
        # Killed between the last step and the end of the run. `Trainer.train` would do one step too many.
        trainer._load_from_checkpoint(str(resumable.path))
        trainer.state = state
        if trainer.args.load_best_model_at_end and state.best_global_step:
            trainer._load_best_model()
        return None
    return trainer.train(resume_from_checkpoint=str(resumable.path)).training_loss


def training_facts(
    trainer: FineTuner, train_loss: float | None, train_wall_s: float, resumable: Resumable
) -> dict[str, Any]:
    """Return what the steps gave: losses, counts, and the throughput of those done since the last resume."""
    state, args = trainer.state, trainer.args
    logged = {key: [line[key] for line in state.log_history if key in line] for key in ("loss", "eval_loss")}
    num_steps_here = state.global_step - resumable.step
    share = num_steps_here / state.global_step if state.global_step else 0.0
    num_samples = num_steps_here * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "num_steps": state.global_step,
        "num_epochs": state.epoch,
        "final_loss": logged["loss"][-1] if logged["loss"] else train_loss,
        "eval_loss": logged["eval_loss"][-1] if logged["eval_loss"] else None,
        "train_wall_s": train_wall_s,
        "samples_per_s": num_samples / train_wall_s,
        "tokens_per_s": float(state.num_input_tokens_seen) * share / train_wall_s,
    }
