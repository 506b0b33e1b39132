"""One training run: a recipe's meaning on top of transformers' `Trainer`.

The run's folder fills in this order: `run.json` (what resume must not change), checkpoints and logs, `model/`, and last
`manifest.json`, after the saved model was reloaded strictly and gave the same loss on one batch.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from mllm_assets.artifacts import is_complete, read_manifest, write_manifest
from mllm_assets.training import caching, freezing, loss, memory, reporting, trackers
from mllm_assets.training.cache_plan import plan_caches
from mllm_assets.training.cache_settings import CacheSettings
from mllm_assets.training.checkpoint_model import remember_beginning
from mllm_assets.training.checkpoints import Resumable, find_resumable, load_trainable, seed_run
from mllm_assets.training.describing import trainable_lines
from mllm_assets.training.device import Device, peak_memory_gib, pick_device, pick_precision
from mllm_assets.training.inputs import make_collator, read_inputs
from mllm_assets.training.model import (
    base_model,
    load_config,
    load_model,
    model_on_meta,
    publish_model,
    quiet_libraries,
    release,
    weights_digest,
)
from mllm_assets.training.ranks import is_first_rank
from mllm_assets.training.run_file import keep_for_life
from mllm_assets.training.spec import TrainSpec
from mllm_assets.training.trainer import make_trainer, require_distribution, run_training, training_facts
from mllm_assets.training.unchanged import require_same_data, require_same_model

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter

NUM_RELOAD_ROWS = 2


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
    for note in request.get("notes") or ():
        reporter.warn(note)
    accelerator = request.get("accelerator") or {}
    device = pick_device(accelerator.get("device") or "auto", use_cpu=spec.use_cpu)
    precision = pick_precision(spec, device)
    run_dir.mkdir(parents=True, exist_ok=True)
    num_threads = fix_num_threads(run_dir, accelerator.get("num_threads"))

    require_distribution(spec, reporter)
    for note in precision.quantization.notes(device.kind) if precision.quantization else ():
        reporter.warn(note)
    model_dir = Path(request["model_dir"])
    require_same_data(Path(request["data_dir"]), request.get("data_digests") or {})
    require_same_model(model_dir, request.get("pretrained_fingerprint"))
    inputs = read_inputs(spec, model_dir, Path(request["data_dir"]), reporter)
    settings = CacheSettings.parse(request)
    shape = freezing.apply(spec, model_on_meta(load_config(model_dir), dtype=precision.weights))
    num_processes = int(accelerator.get("num_processes") or 1)
    cache_plan = plan_caches(shape, spec, settings, inputs, precision, num_processes=num_processes)

    def estimate_for(some: TrainSpec) -> memory.MemoryEstimate:
        return caching.estimate_memory(shape, some, device, precision, inputs, cache_plan)

    spec = fit_micro_batch(spec, run_dir, device, estimate_for, reporter, regroup=bool(request.get("regroup")))
    needed = estimate_for(spec)
    memory.require_memory(needed, device)
    for warning in shape.warnings:
        reporter.warn(warning)
    reporter.say("\n".join(trainable_lines(shape.table, shape.num_params)))

    cached = caching.prepare(
        cache_plan, settings, spec, shape, inputs, model_dir, device.kind, precision, reporter
    )  # fmt: skip
    set_seed(spec.seed)
    model = load_model(model_dir, dtype=precision.weights, quantization=precision.quantization)
    trainable = freezing.apply(spec, model)
    caching.install(base_model(trainable.model), cache_plan)
    if not (spec.fsdp or spec.deepspeed):  # they need the output layer where they can spread it
        loss.install(base_model(trainable.model))

    resumable = clean_and_find_resumable(run_dir, request.get("resume_from"), spec, reporter)
    trainer = make_trainer(spec, run_dir, device, precision, trainable, inputs, cached.collator, resumable, reporter)
    if trainer.is_world_process_zero():
        remember_beginning(run_dir, model_dir, request.get("pretrained_fingerprint"), spec)
    trained_s = time.monotonic()
    train_loss = run_training(trainer, resumable, reporter)
    train_wall_s = time.monotonic() - trained_s
    facts = training_facts(trainer, train_loss, train_wall_s, resumable)
    whole = trainer.gather_trainable() if trainer.is_sharded or precision.quantization else None
    if not trainer.is_world_process_zero():
        return {}

    reporter.progress("publish", 0, 1)
    if precision.quantization:
        release(trainable.model)
    if whole is not None:  # the model here is spread over the processes, or quantised: what is published is neither
        trainable = freezing.apply(spec, load_model(model_dir, dtype=precision.weights))
        load_trainable(trainable.model, whole)
    else:
        loss.uninstall(base_model(trainable.model))
        caching.restore(base_model(trainable.model), cached, model_dir, precision.weights)
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
        "stages": request.get("stages") or [],
        "model_dir": "model",
        "weights_digest": weights_digest(run_dir / "model"),
        **facts,
        "trainable": trainable.table,
        "num_trainable_params": trainable.num_trainable_params,
        "num_params": trainable.num_params,
        "num_train_samples": len(inputs.train_rows),
        "num_eval_samples": len(inputs.eval_rows),
        "num_threads": num_threads,
        "quantization": precision.quantization.describe() if precision.quantization else None,
        "caches": dict(cache_plan.facts),
        "trackers": trackers.tracked(run_dir),
        "warnings": reporter.warnings,
        "device": device.to_dict(),
        "wall_s": time.monotonic() - started_s,
        "peak_memory_gib": peak_memory_gib(device),
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
    num_threads = int(keep_for_life(run_dir, "num_threads", wanted or torch.get_num_threads()))
    torch.set_num_threads(num_threads)
    return num_threads


def fit_micro_batch(
    spec: TrainSpec,
    run_dir: Path,
    device: Device,
    estimate_for: Callable[[TrainSpec], memory.MemoryEstimate],
    reporter: "Reporter",
    *,
    regroup: bool,
) -> TrainSpec:
    """Say what the run needs and what would fit; with `regroup` take the largest micro-batch that does."""
    fitting = memory.largest_micro_batch(spec, device, estimate_for)
    if regroup:
        size = keep_for_life(run_dir, "per_device_train_batch_size", fitting.per_device_train_batch_size)
        samples = spec.per_device_train_batch_size * spec.gradient_accumulation_steps
        spec = dataclasses.replace(spec, per_device_train_batch_size=size, gradient_accumulation_steps=samples // size)
    text = f"memory: {estimate_for(spec).describe()} of {device.memory_gib:.1f} GiB with {_grouping(spec)}"
    if fitting != spec and estimate_for(fitting).total_gib <= device.memory_gib:
        text += (
            f"; {_grouping(fitting)} would fit with {estimate_for(fitting).total_gib:.2f} GiB "
            f"(regroup_micro_batches: true takes it)"
        )
    reporter.say(text)
    return spec


def _grouping(spec: TrainSpec) -> str:
    return f"micro-batches of {spec.per_device_train_batch_size} x {spec.gradient_accumulation_steps}"


def clean_and_find_resumable(
    run_dir: Path, resume_from: str | None, spec: TrainSpec, reporter: "Reporter"
) -> Resumable:
    """Take out what a kill left half-written, and say which checkpoints cannot be used.

    A run that has none of its own begins with `resume_from`, where the recipe names one.
    """
    for leftover in run_dir.glob(".*.tmp") if is_first_rank() else ():
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    resumable = find_resumable(run_dir)
    if resume_from is not None and resumable.path is None:
        if is_first_rank():
            seed_run(run_dir, Path(resume_from), with_best=spec.evaluation_selects)
        while not is_complete(run_dir / Path(resume_from).name):  # where the first rank fails, torchrun ends this one
            time.sleep(0.1)
        resumable = dataclasses.replace(find_resumable(run_dir), skipped=resumable.skipped)
    for skipped in resumable.skipped:
        reporter.warn(f"{skipped['name']} is skipped: {skipped['reason']}.")
    return resumable
