"""The swap that lets training steps run without the frozen parts of a model, whose output is computed once.

What a step does not need is not in memory either: its weights are dropped when the cache takes over, and read again
from the model's directory when the trained model is published.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mllm_assets.training import features, hidden_states, tower
from mllm_assets.training.cache_plan import CachePlan
from mllm_assets.training.cache_settings import CacheSettings
from mllm_assets.training.collate import Collator
from mllm_assets.training.device import Device, Precision
from mllm_assets.training.freezing import TrainableSet
from mllm_assets.training.inputs import Inputs, make_collator
from mllm_assets.training.memory import MemoryEstimate, checkpoints_activations, estimate
from mllm_assets.training.model import load_model
from mllm_assets.training.ranks import num_ranks, rank
from mllm_assets.training.spec import TrainSpec

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter


@dataclass(kw_only=True, slots=True)
class Cached:
    """What stands in the model's places while it trains, and the batches that go with it."""

    collator: Collator
    taken: list[str] = field(default_factory=list)


def estimate_memory(
    shape: TrainableSet,
    spec: TrainSpec,
    device: Device,
    precision: Precision,
    inputs: Inputs,
    cache_plan: CachePlan,
) -> MemoryEstimate:
    """Estimate the run's peak from the model's shape on `meta`."""
    rows = inputs.images
    return estimate(
        shape,
        spec,
        precision,
        num_tokens=max(len(row.input_ids) for row in rows),
        num_images=max(len(row.images) for row in rows),
        num_patches=max((row.num_patches for row in rows if row.num_patches is not None), default=None),
        num_supervised=max(sum(label >= 0 for label in row.labels) for row in rows),
        checkpointed=checkpoints_activations(spec, device),
        tower_cached=cache_plan.tower,
        merges_here=precision.quantization is not None and device.kind == "cpu",
    )


def prepare(
    cache_plan: CachePlan, settings: CacheSettings, spec: TrainSpec, shape: TrainableSet, inputs: Inputs,
    model_dir: Path, device_kind: str, precision: Precision, reporter: "Reporter",
) -> Cached:  # fmt: skip
    """Compute what is missing and compare some of it with the model's own output, before the model that trains loads.

    The model is loaded for this and let go again, so that the frozen parts are not in memory while training. Every
    process computes its share of what is missing and waits for the others.

    Raises:
        IntegrityError: What is cached is damaged or not what this model computes.
        RecipeError: What is cached trains.
        DataError: An image is damaged.
    """
    if cache_plan.tower:
        tower.require_frozen(shape.names, shape.family)
    if cache_plan.boundary is None and not cache_plan.tower:
        return Cached(collator=make_collator(spec, inputs.processor))
    model = load_model(model_dir, dtype=precision.weights, quantization=precision.quantization)
    work = _Work(settings, spec, inputs, model, device_kind, precision, reporter)
    if cache_plan.boundary is None:
        return Cached(
            collator=make_collator(spec, inputs.processor, features=work.feature_reader()),
            taken=tower.paths(shape.model),
        )
    reader = work.hidden_state_reader(cache_plan.boundary, from_features=cache_plan.tower)
    return Cached(
        collator=make_collator(spec, inputs.processor, hidden_states=reader),
        taken=[
            *tower.paths(shape.model),
            "model.multi_modal_projector",
            *(f"{hidden_states.LAYERS}.{index}" for index in range(cache_plan.boundary)),
        ],
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """One model at work on what is missing."""

    settings: CacheSettings
    spec: TrainSpec
    inputs: Inputs
    model: Any
    device_kind: str
    precision: Precision
    reporter: "Reporter"

    @property
    def pixels(self) -> Collator:
        return make_collator(self.spec, self.inputs.processor)

    def feature_reader(self) -> features.FeatureReader:
        model, inputs = self.model, self.inputs
        fingerprint = tower.tower_fingerprint(model, inputs.processor, self.spec, self.precision)
        directory = self.settings.features_dir or Path(str(self.settings.features_root)) / fingerprint
        features.require_fingerprint(directory, fingerprint)
        tower.move(model, self.device_kind)
        if self.settings.features_dir is None:
            features.compute_missing(
                model, self.pixels, features.images_by_digest(inputs.images), directory, self.precision, self.reporter,
                num_workers=self.spec.dataloader_num_workers, part=(rank(), num_ranks()),
            )  # fmt: skip
        reader = features.FeatureReader(directory)
        features.require_match(reader, model, self.pixels, inputs.images, self.precision)
        return reader

    def hidden_state_reader(self, boundary: int, *, from_features: bool) -> hidden_states.HiddenStateReader:
        model, rows = self.model, self.inputs.images
        fingerprint = hidden_states.prefix_fingerprint(
            model, boundary, self.inputs.processor, self.spec, self.precision
        )
        directory = Path(str(self.settings.hidden_states_root)) / fingerprint
        model.to(self.device_kind)
        reader = hidden_states.HiddenStateReader(directory)
        if reader.store.missing([reader.name(row) for row in rows]):
            collator, own_tower = self.pixels, None
            if from_features:
                collator = make_collator(self.spec, self.inputs.processor, features=self.feature_reader())
                own_tower = tower.install(model)
            hidden_states.compute_missing(
                model, boundary, collator, rows, directory, self.precision, self.reporter, part=(rank(), num_ranks())
            )
            if own_tower is not None:
                tower.uninstall(model, own_tower)
            reader = hidden_states.HiddenStateReader(directory)
        hidden_states.require_match(reader, model, boundary, self.pixels, rows, self.precision)
        return reader


def install(model: Any, cache_plan: CachePlan) -> None:
    """Put the caches in the places of what they stand in for."""
    if cache_plan.tower or cache_plan.boundary is not None:
        tower.install(model)
    if cache_plan.boundary is not None:
        hidden_states.install(model, cache_plan.boundary)


def restore(model: Any, cached: Cached, model_dir: Path, dtype: torch.dtype) -> None:
    """Put what the caches stood in for back into the trained model, from the model's directory.

    Args:
        model: The model, out of its LoRA wrapping.
        cached: From `prepare`.
        model_dir: Where the run started from.
        dtype: Of frozen weights in this run, so that cached and uncached runs publish the same bytes.
    """
    if not cached.taken:
        return
    device = model.lm_head.weight.device
    source = load_model(model_dir)
    modules = {
        path: source.get_submodule(path).to(dtype=dtype).to(device).requires_grad_(False) for path in cached.taken
    }
    tower.uninstall(model, {path: modules.pop(path) for path in tower.paths(model)})
    for path, module in modules.items():
        model.set_submodule(path, module)
    model.main_input_name = type(model).main_input_name
