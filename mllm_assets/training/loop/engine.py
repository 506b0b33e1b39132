"""One training run: a recipe's meaning on top of transformers' `Trainer`.

The run's folder fills in this order: `run.json` (what resume must not change), checkpoints and logs, `model/`, and last
`manifest.json`, after the saved model was reloaded strictly and gave the same loss on one batch.
"""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from mllm_assets.artifacts import is_complete, read_manifest, write_manifest
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import IntegrityError
from mllm_assets.families.family import family_of, note_on_own_files
from mllm_assets.file_digests import FileDigests
from mllm_assets.plugins import resolve
from mllm_assets.training.caches.prepare import (
    CachePlan,
    Setup,
    fill_caches,
    install_caches,
    plan_caches,
    restore_modules,
)
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.encoding.inputs import check_reach, read_inputs
from mllm_assets.training.encoding.kept_pixels import KeptPixels
from mllm_assets.training.loop import loss, memory, reporting
from mllm_assets.training.loop.checkpoints import Resumable, clean_and_find_resumable, load_trainable
from mllm_assets.training.loop.fitting import decide_checkpointing, fit_micro_batch, note_on_answers, what_fits
from mllm_assets.training.loop.group_tuner import GroupTuner
from mllm_assets.training.loop.optimizers import require_optimizer
from mllm_assets.training.loop.preferences import require_one_process
from mllm_assets.training.loop.reporting import trainable_lines
from mllm_assets.training.loop.trainer import Asks, FineTuner, require_distribution, run_training, training_facts
from mllm_assets.training.loop.tuners import make_tuner
from mllm_assets.training.models import freezing, value_head
from mllm_assets.training.models.cards import note_on_idle_cards
from mllm_assets.training.models.device import (
    notes_on_precision,
    out_of_memory_is_an_error,
    peak_memory_gib,
    pick_device,
    pick_precision,
)
from mllm_assets.training.models.kernels import (
    install_kernels,
    require_kernels,
    require_liger_layers,
    uninstall_kernels,
    uses_liger,
)
from mllm_assets.training.models.load import (
    base_model,
    load_config,
    load_model,
    model_on_meta,
    publishing_dtype,
    quiet_libraries,
    release,
    weights_digest,
)
from mllm_assets.training.models.publishing import publish_model
from mllm_assets.training.models.vocabulary import FOLDER, extended_base
from mllm_assets.training.models.weight_files import Sharing
from mllm_assets.training.runs.models import PUBLISHED, starting_fingerprint
from mllm_assets.training.runs.run_file import (
    DATA_DIGESTS,
    StartingModel,
    pin_setting,
    record_starting_model,
)
from mllm_assets.worker.protocol import is_first_rank, num_ranks, rank
from mllm_assets.worker.tasks import Manifest, Part, TrainTask

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

NUM_RELOAD_ROWS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A run with its model in memory: what a step does not need is cached, and its last checkpoint is found."""

    setup: Setup
    plan: CachePlan
    needed: memory.MemoryEstimate
    trainable: freezing.TrainableSet
    resumable: Resumable
    collator: Collator
    trainer: FineTuner


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What the steps gave: figures, and all trained weights where this process's model is sharded or quantised."""

    facts: dict[str, Any]
    weights: dict[str, torch.Tensor] | None


def train_task(task: TrainTask, reporter: "Reporter") -> Manifest:
    """Train, or return the manifest of a finished run.

    An unfinished run resumes from its newest undamaged checkpoint and ends with the same weights, bit for bit on the
    CPU, as one that was never interrupted.

    Raises:
        MllmAssetsError: Recipe, data, model, machine or disk must change. Checkpoints stay.
    """
    if is_complete(task.run_dir):
        return read_manifest(task.run_dir)
    started_s = time.monotonic()
    setup = open_run(task, reporter)
    prepared = prepare_run(task, setup, reporter)
    trained = train(prepared, reporter)
    if not prepared.trainer.is_world_process_zero():
        return {}
    reporter.progress("publish", 0, 1)
    cure = "Run again: it goes on from its last checkpoint, with the memory of the steps free."
    with out_of_memory_is_an_error("while the trained model was published", cure):
        reload = publish(task, prepared, trained)
    _withdraw_if_changed(task.run_dir, setup.inputs.digests)
    own = FileDigests()  # each file of the model is read once for both, and not those that were linked
    linked = reload.pop("linked_files")
    for name, digest in linked.items():
        own.take(task.run_dir / "model" / name, digest)
    result = {
        **_inputs_of(task, setup),
        **_outcome_of(task, prepared),
        "weights_digest": weights_digest(task.run_dir / "model", own.of),
        **trained.facts,
        "reload": reload,
        "base_weights": {"digest": weights_digest(setup.model_dir, setup.inputs.digests.of), "linked": sorted(linked)},
        "warnings": reporter.warnings,
        "wall_s": time.monotonic() - started_s,
        "peak_memory_gib": peak_memory_gib(setup.device),
    }
    apart = [FOLDER, *(path.name for path in task.run_dir.glob("checkpoint-*"))]
    manifest = write_manifest(task.run_dir, result, skip=apart, digest=own.of)
    reporter.progress("publish", 1, 1)
    return manifest


def open_run(task: TrainTask, reporter: "Reporter") -> Setup:
    """Choose device and precision, compare data and model with the digests that named the run, and read the data."""
    quiet_libraries()
    for note in task.notes:
        reporter.warn(note)
    device = pick_device(task.accelerator.device, use_cpu=task.recipe.use_cpu, warn=reporter.warn)
    precision = pick_precision(task.recipe, device)
    if device.kind == "cuda" and (note := note_on_idle_cards(task.accelerator.num_processes)):
        reporter.notify(note)
    task.run_dir.mkdir(parents=True, exist_ok=True)
    # a run keeps its number of threads: sums in another order give other last bits
    wanted = task.accelerator.num_threads or torch.get_num_threads()
    torch.set_num_threads(pin_setting(task.run_dir, "num_threads", wanted))
    require_distribution(task.recipe, reporter)
    require_kernels(task.recipe, device.kind)
    if task.recipe.enable_liger_kernel and not uses_liger(task.recipe, device.kind):
        reporter.warn(f"enable_liger_kernel has no effect on {device.kind}: Liger's kernels are for CUDA.")
    require_optimizer(task.recipe, device.kind)
    require_one_process(task.recipe)
    for note in precision.quantization.notes(device.kind) if precision.quantization else ():
        reporter.warn(note)
    digests = FileDigests()
    digests.take_untouched(task.model_files)
    require_same_model(task.model_dir, task.pretrained_fingerprint, digests, task.adapters)
    kept = task.caches.weights_root
    model_dir = extended_base(task.model_dir, task.recipe, task.run_dir, digests, kept)
    config = load_config(model_dir)
    family = family_of(config.model_type)
    require_liger_layers(task.recipe, family)
    for note in (*notes_on_precision(precision, family), *note_on_own_files(family)):
        reporter.warn(note)
    shape = model_on_meta(config, dtype=precision.weights, attention=precision.attention)
    return Setup(
        spec=task.recipe,
        model_dir=model_dir,
        inputs=read_inputs(task.recipe, model_dir, unchanged_data(task, digests), task.rows_root, reporter),
        device=device,
        precision=precision,
        shape=freezing.apply(task.recipe, shape, task.adapters),
        adapters=task.adapters,
        caches=task.caches,
        measured=task.measured if task.recipe.eval_entries else (),
        num_processes=task.accelerator.num_processes,
    )


def prepare_run(task: TrainTask, setup: Setup, reporter: "Reporter") -> Prepared:
    """Refuse what cannot fit, cache what is frozen, load what trains, and find the checkpoint to resume from."""
    check_reach(setup.shape, setup.inputs.train_rows, setup.spec, reporter)
    plan = plan_caches(setup)
    setup = decide_checkpointing(setup, plan, task.run_dir)
    setup = fit_micro_batch(setup, plan, task, reporter)
    needed = memory.estimate(setup, plan)
    memory.require_memory(needed, setup.device, lambda: what_fits(setup))
    note = note_on_answers(setup, load_config(setup.model_dir).dtype or torch.float32)
    for warning in (*setup.shape.warnings, *([note] if note else [])):
        reporter.warn(warning)
    reporter.notify("\n".join(trainable_lines(setup.shape.table, setup.shape.num_params)))

    cure = "End other programs on the device, or set feature_cache: false for the recipe."
    with out_of_memory_is_an_error("while the model was loaded and its frozen parts' output was cached", cure):
        collator, model = fill_caches(plan, setup, reporter)
        collator.keep_pixels(KeptPixels())
        collator.selects_by_mask = setup.device.kind == "cpu" and setup.spec.copies_answers
        set_seed(setup.spec.seed)
        trainable = freezing.apply(setup.spec, model, setup.adapters)
    del model
    install_caches(base_model(trainable.model), plan)
    if setup.shape.family.is_described:
        loss.install_for(setup.spec, base_model(trainable.model))
    install_kernels(trainable.model, setup.spec, setup.device.kind)

    resumable = clean_and_find_resumable(task.run_dir, task.resume_from, setup.spec, reporter)
    trainer = make_tuner(setup, task.run_dir, trainable, collator, resumable, reporter)
    if isinstance(trainer, GroupTuner):
        trainer.rewards = resolve(task.rewards_with)(task, setup, base_model(trainable.model), collator.features)
        reporter.notify(trainer.rewards.describe())
    if setup.measured:
        asks: Asks = resolve(task.asks_with)(task, setup, base_model(trainable.model), collator.features)
        trainer.answers = asks
        reporter.notify(asks.describe())
    if trainer.is_world_process_zero():
        start = StartingModel(task.model_dir, task.pretrained_fingerprint, setup.spec, task.adapters)
        record_starting_model(task.run_dir, start)
        pin_setting(task.run_dir, DATA_DIGESTS, task.data_digests)
        pin_setting(task.run_dir, "overrides", dict(task.overrides))  # so that an unfinished run has its name
    return Prepared(
        setup=setup,
        plan=plan,
        needed=needed,
        trainable=trainable,
        resumable=resumable,
        collator=collator,
        trainer=trainer,
    )


def train(prepared: Prepared, reporter: "Reporter") -> Trained:
    """Do the remaining steps, and gather what was trained from all processes."""
    trainer, started_s = prepared.trainer, time.monotonic()
    train_loss = run_training(trainer, prepared.resumable, reporter)
    facts = training_facts(trainer, train_loss, time.monotonic() - started_s, prepared.resumable)
    if notice := trainer.padding.notice(trainer.args.train_sampling_strategy):
        reporter.notify(notice)
    precision = prepared.setup.precision
    is_rounded = publishing_dtype(prepared.setup.model_dir, precision.weights) != precision.weights
    gathers = trainer.is_sharded or precision.quantization is not None or is_rounded
    return Trained(facts=facts, weights=trainer.gather_trainable() if gathers else None)


def publish(task: TrainTask, prepared: Prepared, trained: Trained) -> dict[str, Any]:
    """Save the complete model, reload it, and return how the two agree on one batch."""
    setup, trainer, trainable = prepared.setup, prepared.trainer, prepared.trainable
    uninstall_kernels(trainable.model, setup.spec)  # what is published is compared with what its files hold
    if trained.weights is not None and not trainer.is_sharded:
        release(trainable.model)
    if trained.weights is not None:  # this process's model is sharded, quantised or rounded, so not what is published
        dtype = publishing_dtype(setup.model_dir, setup.precision.weights)
        place = memory.publishing_device(setup, dtype, num_rows=NUM_RELOAD_ROWS)
        trainable = freezing.apply(setup.spec, load_model(setup.model_dir, dtype=dtype, device=place), setup.adapters)
        load_trainable(trainable.model, trained.weights)
    else:
        loss.uninstall(base_model(trainable.model))
        restore_modules(base_model(trainable.model), prepared.plan, setup.model_dir, setup.precision.weights)
    setup.inputs.digests.require_unchanged()
    rows = (setup.inputs.eval_rows or setup.inputs.train_rows)[:NUM_RELOAD_ROWS]
    batch = setup.collator()(rows)
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # takes autocast off `forward`
    trainer.accelerator.free_memory()
    if setup.precision.attention is not None:  # what a user loads has the usual one
        usual = model_on_meta(load_config(setup.model_dir)).config._attn_implementation
        base_model(trainable.model).set_attn_implementation(usual)
    reload = publish_model(
        trainable.model, setup.inputs.processor, task.run_dir, setup.model_dir, batch,
        with_adapter=trainable.adapter_stands_alone, sharing=_sharing(setup, trainable),
    )  # fmt: skip
    reporting.plot_loss(task.run_dir)
    return reload


def _sharing(setup: Setup, trainable: freezing.TrainableSet) -> Sharing | None:
    """What is published may share files with the model in `model_dir`; not where adapters were merged into it first."""
    if len(setup.adapters) > setup.spec.continues_adapter:
        return None
    trained = [name for name in trainable.names if not name.startswith(f"{value_head.NAME}.")]
    return Sharing(trained=trained, kept=setup.caches.weights_root, digests=setup.inputs.digests)


def _withdraw_if_changed(run_dir: Path, digests: FileDigests) -> None:
    """Take back what was published of a run if what it read is no longer what it is named by.

    Raises:
        IntegrityError: It is not. Checkpoints stay: each was written while it still was.
    """
    try:
        digests.require_unchanged()
    except IntegrityError:
        for name in PUBLISHED:
            shutil.rmtree(run_dir / name, ignore_errors=True)
        raise


def _inputs_of(task: TrainTask, setup: Setup) -> dict[str, Any]:
    """What the manifest says of where the run came from."""
    quantization = setup.precision.quantization
    return {
        "recipe_name": task.recipe_name,
        "fingerprint": task.fingerprint,
        "overrides": task.overrides,
        "data_digests": task.data_digests,
        "stages": list(task.stages),
        "num_train_samples": len(setup.inputs.train_rows),
        "num_eval_samples": len(setup.inputs.eval_rows),
        "num_threads": torch.get_num_threads(),
        "quantization": quantization.describe() if quantization else None,
        "device": asdict(setup.device),
    }


def _outcome_of(task: TrainTask, prepared: Prepared) -> dict[str, Any]:
    """What the manifest says of what was trained."""
    shape, resumable = prepared.setup.shape, prepared.resumable
    return {
        "recipe": prepared.setup.spec.to_dict(),
        "model_dir": "model",
        "trainable": shape.table,
        "num_trainable_params": shape.num_trainable_params,
        "num_params": shape.num_params,
        "caches": dict(prepared.plan.facts),
        "trackers": reporting.tracker_runs(task.run_dir),
        **({"asked": {**asdict(task.answers), "metrics": list(prepared.setup.measured)}} if task.measured else {}),
        "memory_estimate_gib": prepared.needed.total_gib,
        "resumed_from_step": resumable.step if resumable.path else None,
        "skipped_checkpoints": resumable.skipped,
    }


def unchanged_data(task: TrainTask, digests: FileDigests) -> Dataset:
    """Return the data, and refuse what changed since it was published, or since the run was named by it.

    Each process reads its share of the images whose digests are recorded.

    Raises:
        IntegrityError: Names the image or the entry.
    """
    part = Part(index=rank(), count=num_ranks())
    dataset = Dataset(
        task.data_dir, media_dir=task.media_dir, read_part=part, digests=digests, rows_root=task.rows_root
    )
    for name in dict.fromkeys((*task.recipe.train_entries, *task.recipe.eval_entries)):
        dataset.entry(name).require_unchanged(task.data_digests.get(name))
    return dataset


def require_same_model(
    model_dir: Path, fingerprint: str, digests: FileDigests, adapters: tuple[Path, ...] = ()
) -> None:
    """Refuse a model that is not the one the run was named by, or whose files changed since they were written.

    Every byte is read, once for all processes of a run and the one that named it: weights that changed on disk load
    without an error.

    Raises:
        IntegrityError: Names the file if a manifest has its digest.
    """
    if not is_first_rank():
        return
    found = starting_fingerprint(model_dir, adapters, digests)
    if found != fingerprint:
        what = "The model, or an adapter on it," if adapters else "The model"
        raise IntegrityError(
            f"{what} in {model_dir} changed after this run was named by its content: expected digest "
            f"{fingerprint[:12]}, found {found[:12]}. Start the run again: it gets a new name."
        )
