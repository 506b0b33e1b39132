"""What of a run is fitted to its device's memory: activations computed twice, micro-batches, and what would fit."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mllm_assets.errors import MllmAssetsError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches.prepare import CachePlan, Setup, plan_caches
from mllm_assets.training.loop import memory
from mllm_assets.training.models import freezing
from mllm_assets.training.models.device import GIB
from mllm_assets.training.models.load import base_model, model_on_meta
from mllm_assets.training.models.quantization import Quantization
from mllm_assets.training.runs.run_file import pin_setting, read_run_file
from mllm_assets.worker.tasks import TrainTask

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

CHECKPOINTED = "activations_computed_twice"  # in run.json


def decide_checkpointing(setup: Setup, plan: CachePlan, run_dir: Path) -> Setup:
    """Compute activations twice where the run does not fit otherwise; a run keeps its choice for life."""
    kept = read_run_file(run_dir).get(CHECKPOINTED)
    wanted = memory.needs_checkpointing(setup, plan) if kept is None else kept
    return replace(setup, checkpointed=pin_setting(run_dir, CHECKPOINTED, wanted))


def fit_micro_batch(setup: Setup, plan: CachePlan, task: TrainTask, reporter: "Reporter") -> Setup:
    """Report the memory that the run needs and what would fit; with `regroup` take the largest that fits."""

    def estimate_for(spec: TrainSpec) -> memory.MemoryEstimate:
        return memory.estimate(replace(setup, spec=spec), plan)

    spec, device = setup.spec, setup.device
    fitting = memory.largest_micro_batch(spec, device, estimate_for)
    if task.regroup:
        size = pin_setting(task.run_dir, "per_device_train_batch_size", fitting.per_device_train_batch_size)
        samples = spec.per_device_train_batch_size * spec.gradient_accumulation_steps
        spec = replace(spec, per_device_train_batch_size=size, gradient_accumulation_steps=samples // size)
    text = f"memory: {estimate_for(spec).describe()} of {device.usable_gib:.1f} GiB free with {_grouping(spec)}"
    if device.kind != "cpu":
        text += f", activations computed {'twice (gradient checkpointing)' if setup.checkpointed else 'once'}"
    if fitting != spec and (larger := estimate_for(fitting)).fits(device):
        ratio = fitting.per_device_train_batch_size / spec.per_device_train_batch_size
        text += f"; {_grouping(fitting)} would fit with {larger.total_gib:.2f} GiB"
        text += "" if device.kind == "cpu" else f", for a step of {ratio:g} times fewer kernels"
        text += " (regroup_micro_batches: true takes it)"
    reporter.notify(text)
    return replace(setup, spec=spec)


def _grouping(spec: TrainSpec) -> str:
    return f"micro-batches of {spec.per_device_train_batch_size} x {spec.gradient_accumulation_steps}"


def what_fits(setup: Setup) -> str | None:
    """Name changes of a recipe, the mildest first and as few as suffice, with which its run would fit here."""
    changed = setup
    for change in CHANGES:
        try:
            changed = change(changed)
            needed = memory.estimate(changed, plan_caches(changed))
        except MllmAssetsError:  # values that do not go together
            continue
        if changed is not setup and needed.fits(setup.device):
            before, after = setup.spec.to_dict(), changed.spec.to_dict()
            named = ", ".join(f"{key}: {_yaml(after[key])}" for key in after if after[key] != before[key])
            return f"With {named} it would need {needed.on(setup.device):.1f} GiB and fit"
    return None


def note_on_answers(setup: Setup, published: torch.dtype) -> str | None:
    """Say before a run what can be known of its end: that the model is too large to be asked on the device.

    A run may hold its model in fewer bits than it publishes, and without its tower.
    """
    weights_gib = setup.shape.num_params * published.itemsize / GIB
    whole = memory.MemoryEstimate(weights_gib=weights_gib, gradients_gib=0.0, optimizer_gib=0.0, activations_gib=0.0)
    if setup.device.kind == "cpu" or whole.fits(setup.device):
        return None
    return (
        f"The trained model will take {whole.on(setup.device):.1f} GiB to be asked, and {setup.device.name} has "
        f"{setup.device.usable_gib:.1f} GiB free: predictions, and so gates and a release, need another device. "
        "MLLM_ASSETS_DEVICE=cpu makes them on the CPU, slowly; the trained run is found there too."
    )


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _twice(setup: Setup) -> Setup:
    if not setup.spec.disable_gradient_checkpointing or setup.device.kind == "cpu":
        return setup
    return replace(setup, spec=replace(setup.spec, disable_gradient_checkpointing=False), checkpointed=True)


def _fewer_rows(setup: Setup) -> Setup:
    def estimate_for(spec: TrainSpec) -> memory.MemoryEstimate:
        return memory.estimate(replace(setup, spec=spec), plan_caches(setup))

    fitting = memory.largest_micro_batch(setup.spec, setup.device, estimate_for)
    if fitting != setup.spec:
        return replace(setup, spec=fitting)
    samples = setup.spec.per_device_train_batch_size * setup.spec.gradient_accumulation_steps
    one_row = replace(setup.spec, per_device_train_batch_size=1, gradient_accumulation_steps=samples)
    return replace(setup, spec=one_row)


def _bf16(setup: Setup) -> Setup:
    is_slow = setup.device.kind == "cuda" and not torch.cuda.is_bf16_supported(False)
    if setup.precision.weights != torch.float32 or is_slow:
        return setup
    precision = replace(setup.precision, weights=torch.bfloat16, autocast="bf16")
    return _reshaped(replace(setup, spec=replace(setup.spec, bf16=True), precision=precision))


def _lora(setup: Setup) -> Setup:
    if setup.spec.adds_adapters:
        return setup
    spec = replace(setup.spec, finetuning_type="lora", freeze_language_model=False)
    return _reshaped(replace(setup, spec=spec))


def _four_bits(setup: Setup) -> Setup:
    spec = setup.spec
    if spec.quantization_bit == 4 or setup.device.kind != "cuda":
        return setup
    quantization = Quantization(bits=4, type=spec.quantization_type, double=spec.double_quantization)
    precision = replace(setup.precision, quantization=quantization)
    return _reshaped(replace(setup, spec=replace(spec, quantization_bit=4), precision=precision))


def _reshaped(setup: Setup) -> Setup:
    """With the model's shape as the recipe makes it now."""
    config, precision = copy.deepcopy(base_model(setup.shape.model).config), setup.precision
    on_meta = model_on_meta(config, dtype=precision.weights, attention=precision.attention)
    return replace(setup, shape=freezing.apply(setup.spec, on_meta, setup.adapters))


CHANGES: tuple[Callable[[Setup], Setup], ...] = (_twice, _fewer_rows, _bf16, _lora, _four_bits)
