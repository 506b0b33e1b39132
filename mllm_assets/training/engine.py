"""One training run: a recipe's meaning on top of transformers' `Trainer`.

The run's folder fills in this order: `run.json` (what resume must not change), checkpoints and logs, `model/`, and last
`manifest.json`, after the saved model was reloaded strictly and gave the same loss on one batch.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerState, TrainingArguments, set_seed

from mllm_assets.artifacts import is_complete, read_manifest, write_json_atomic, write_manifest
from mllm_assets.data.sharegpt import entry_digest, load_rows
from mllm_assets.errors import IntegrityError
from mllm_assets.training import features, freezing, memory, reporting
from mllm_assets.training.checkpoints import DeltaTrainer, Resumable, find_resumable
from mllm_assets.training.collate import Collator
from mllm_assets.training.encode import EncodedRow, Encoder, check_image_headers
from mllm_assets.training.model import (
    load_config,
    load_model,
    load_processor,
    model_on_meta,
    publish_model,
    quiet_libraries,
    weights_digest,
)
from mllm_assets.training.spec import TrainSpec

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter

RUN_FILE = "run.json"
NUM_RELOAD_ROWS = 4


class FineTuner(DeltaTrainer):
    """`DeltaTrainer` with LLaMA-Factory's loss and a stop before a step that is not finite."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The loss under accumulation is the mean of micro-batch means, as LLaMA-Factory computes it for images
        self.model_accepts_loss_kwargs = False
        self._last_loss = torch.zeros(())

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._last_loss = super().training_step(*args, **kwargs)
        return self._last_loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.args.fp16:  # fp16's scaler skips such steps itself
            reporting.check_finite(self.state.global_step + 1, float(self._last_loss), float(grad_norm))
        return grad_norm


@dataclass(kw_only=True, slots=True)
class Inputs:
    """What a run reads: the processor and the encoded rows."""

    processor: Any
    train_rows: list[EncodedRow]
    eval_rows: list[EncodedRow]

    @property
    def images(self) -> list[EncodedRow]:
        return [*self.train_rows, *self.eval_rows]


def train_task(request: dict[str, Any], reporter: "Reporter") -> dict[str, Any]:
    """Train what `request` describes, or return what a finished run says.

    An unfinished run goes on from its newest undamaged checkpoint and ends with the same weights, bit for bit on the
    CPU, as one that was never interrupted.

    Raises:
        MllmAssetsError: Recipe, data, model, machine or disk must change. Checkpoints stay.
    """
    run_dir = Path(request["run_dir"])
    if is_complete(run_dir):
        return read_manifest(run_dir)
    started_s = time.monotonic()
    quiet_libraries()
    spec = TrainSpec.from_dict(request["recipe"])
    accelerator = request.get("accelerator") or {}
    device = memory.pick_device(accelerator.get("device") or "auto", use_cpu=spec.use_cpu)
    precision = memory.pick_precision(spec, device)
    run_dir.mkdir(parents=True, exist_ok=True)
    num_threads = fix_num_threads(run_dir, accelerator.get("num_threads"))

    model_dir = Path(request["model_dir"])
    require_same_data(Path(request["data_dir"]), request.get("data_digests") or {})
    inputs = read_inputs(spec, model_dir, Path(request["data_dir"]), reporter)
    features_dir = Path(request["features_dir"]) if request.get("features_dir") else None
    needed = estimate_memory(spec, model_dir, device, precision, inputs, tower_cached=features_dir is not None)
    memory.require_memory(needed, device)

    set_seed(spec.seed)
    model = load_model(model_dir, dtype=precision.weights)
    trainable = freezing.apply(spec, model)
    for warning in trainable.warnings:
        reporter.warn(warning)
    collator = make_collator(spec, inputs.processor)
    tower = None
    if features_dir is not None:
        store = features.FeatureStore(features_dir)
        features.require_match(store, base_model(trainable.model), collator, inputs.images, spec, inputs.processor)
        tower = features.install(base_model(trainable.model), trainable.names)
        collator = make_collator(spec, inputs.processor, store)

    resumable = clean_and_find_resumable(run_dir, reporter)
    trainer = make_trainer(spec, run_dir, device, precision, trainable, inputs, collator, resumable, reporter)
    trained_s = time.monotonic()
    train_loss = run_training(trainer, resumable)
    train_wall_s = time.monotonic() - trained_s
    facts = training_facts(trainer, train_loss, train_wall_s, resumable)
    if not trainer.is_world_process_zero():
        return {}

    reporter.progress("publish", 0, 1)
    trained = base_model(trainable.model)
    if tower is not None:
        features.uninstall(trained, tower.to(next(trained.parameters()).device))
    rows = (inputs.eval_rows or inputs.train_rows)[:NUM_RELOAD_ROWS]
    batch = make_collator(spec, inputs.processor)(rows)
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # takes autocast off `forward`
    trainer.accelerator.free_memory()
    reload = publish_model(trainable.model, inputs.processor, run_dir, model_dir, batch)
    reporting.plot_loss(run_dir)
    result = {
        "recipe_name": request.get("recipe_name"),
        "fingerprint": request.get("fingerprint"),
        "recipe": spec.to_dict(),
        "data_digests": request.get("data_digests") or {},
        "model_dir": "model",
        "weights_digest": weights_digest(run_dir / "model"),
        **facts,
        "trainable": trainable.table,
        "num_trainable_params": trainable.num_trainable_params,
        "num_params": trainable.num_params,
        "num_train_samples": len(inputs.train_rows),
        "num_eval_samples": len(inputs.eval_rows),
        "num_threads": num_threads,
        "features": features_dir is not None,
        "warnings": [*(request.get("notes") or []), *reporter.warnings],
        "device": device.to_dict(),
        "wall_s": time.monotonic() - started_s,
        "peak_memory_gib": memory.peak_memory_gib(device),
        "memory_estimate_gib": needed.total_gib,
        "reload": reload,
        "resumed_from_step": resumable.step if resumable.path else None,
        "skipped_checkpoints": resumable.skipped,
    }
    manifest = write_manifest(run_dir, result, skip=[path.name for path in run_dir.glob("checkpoint-*")])
    reporter.progress("publish", 1, 1)
    return manifest


def fix_num_threads(run_dir: Path, wanted: int | None) -> int:
    """Set the number of CPU threads, which a run keeps for life: sums in another order give other last bits."""
    path = run_dir / RUN_FILE
    if path.is_file():
        num_threads = int(json.loads(path.read_text(encoding="utf-8"))["num_threads"])
    else:
        num_threads = int(wanted or torch.get_num_threads())
        write_json_atomic(path, {"num_threads": num_threads})
    torch.set_num_threads(num_threads)
    return num_threads


def require_same_data(data_dir: Path, digests: Mapping[str, str]) -> None:
    """Refuse data that changed since the run was named by it.

    Raises:
        IntegrityError: Names the entry.
    """
    for entry, expected in digests.items():
        found = entry_digest(data_dir, entry)
        if found != expected:
            raise IntegrityError(
                f"The entry {entry} in {data_dir} changed after this run was named by its content: expected digest "
                f"{expected[:12]}, found {found[:12]}. Start the run again: it gets a name of its own."
            )


def read_inputs(spec: TrainSpec, model_dir: Path, data_dir: Path, reporter: "Reporter") -> Inputs:
    """Load and encode all rows and open every image's header, so that bad data is named before the first step.

    Raises:
        DataError, RecipeError, ModelError: What must change.
    """
    processor = load_processor(model_dir)
    encoder = Encoder(processor, cutoff_len=spec.cutoff_len)

    def rows(entries: Sequence[str]) -> list[EncodedRow]:
        loaded = [row for entry in entries for row in load_rows(data_dir, entry, max_samples=spec.max_samples)]
        return [encoder.encode(row) for row in loaded]

    evaluates = spec.eval_strategy != "no"
    inputs = Inputs(
        processor=processor,
        train_rows=rows(spec.train_entries),
        eval_rows=rows(spec.eval_entries) if evaluates else [],
    )
    num_cut = sum(row.num_tokens_cut > 0 for row in inputs.images)
    if num_cut:
        reporter.warn(
            f"{num_cut} of {len(inputs.images)} rows are longer than cutoff_len {spec.cutoff_len} and were cut."
        )
    check_image_headers(inputs.images)
    return inputs


def make_collator(spec: TrainSpec, processor: Any, store: features.FeatureStore | None = None) -> Collator:
    """Return the recipe's collator, on pixels or on cached features."""
    return Collator(
        processor, image_max_pixels=spec.image_max_pixels, image_min_pixels=spec.image_min_pixels, features=store
    )


def estimate_memory(
    spec: TrainSpec,
    model_dir: Path,
    device: memory.Device,
    precision: memory.Precision,
    inputs: Inputs,
    *,
    tower_cached: bool,
) -> memory.MemoryEstimate:
    """Estimate the run's peak from the model's shape on `meta`."""
    shape = freezing.apply(spec, model_on_meta(load_config(model_dir), dtype=precision.weights))
    rows = inputs.images
    return memory.estimate(
        shape,
        spec,
        precision,
        num_tokens=max(len(row.input_ids) for row in rows),
        num_images=max(len(row.images) for row in rows),
        num_supervised=max(sum(label >= 0 for label in row.labels) for row in rows),
        checkpointed=memory.checkpoints_activations(spec, device),
        tower_cached=tower_cached,
    )


def clean_and_find_resumable(run_dir: Path, reporter: "Reporter") -> Resumable:
    """Take out what a kill left half-written, and say which checkpoints cannot be used."""
    is_first_rank = int(os.environ.get("RANK", "0")) == 0
    for leftover in run_dir.glob(".*.tmp") if is_first_rank else ():
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    resumable = find_resumable(run_dir)
    for skipped in resumable.skipped:
        reporter.warn(f"{skipped['name']} is skipped: {skipped['reason']}.")
    return resumable


def make_trainer(
    spec: TrainSpec,
    run_dir: Path,
    device: memory.Device,
    precision: memory.Precision,
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
    if spec.disable_shuffling:
        values["train_sampling_strategy"] = "sequential"
    if device.kind == "cpu":
        values["dataloader_pin_memory"] = False
    args = TrainingArguments(
        **values,
        output_dir=str(run_dir),
        bf16=precision.autocast == "bf16",
        fp16=precision.autocast == "fp16",
        tf32=spec.tf32 if device.kind == "cuda" else None,
        use_cpu=device.kind == "cpu",
        activation_checkpointing=memory.checkpoints_activations(spec, device),
        activation_checkpointing_kwargs={"use_reentrant": False},
        report_to="none",
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
    trainer = FineTuner(
        model=trainable.model,
        args=args,
        data_collator=collator,
        train_dataset=inputs.train_rows,  # pyright: ignore[reportArgumentType]
        eval_dataset=inputs.eval_rows or None,  # pyright: ignore[reportArgumentType]
        callbacks=callbacks,
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    return trainer


def run_training(trainer: FineTuner, resumable: Resumable) -> float | None:
    """Train to the end and return the mean loss of the steps done here; None where none was left to do."""
    if resumable.path is None:
        return trainer.train().training_loss
    state = TrainerState.load_from_json(str(resumable.path / "trainer_state.json"))
    if state.global_step >= state.max_steps:
        # Killed between the last step and the end of the run. `Trainer.train` would do one step too many.
        trainer._load_from_checkpoint(str(resumable.path))
        trainer.state = state
        if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
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


def base_model(model: Any) -> Any:
    """Return the `Gemma3ForConditionalGeneration` inside, which LoRA wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
