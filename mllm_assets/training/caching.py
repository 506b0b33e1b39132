"""Which frozen parts of a run are computed once, and the swap that lets training steps run without them.

What a step does not need is not in memory either: its weights are dropped when the cache takes over, and read again
from the model's directory when the trained model is published.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mllm_assets.training import features, hidden_states, tower
from mllm_assets.training.cache_settings import CacheSettings
from mllm_assets.training.collate import Collator
from mllm_assets.training.device import GIB, Device, Precision
from mllm_assets.training.freezing import TrainableSet
from mllm_assets.training.inputs import Inputs, make_collator
from mllm_assets.training.memory import MemoryEstimate, checkpoints_activations, estimate
from mllm_assets.training.model import load_model
from mllm_assets.training.ranks import num_ranks, rank
from mllm_assets.training.spec import TrainSpec

if TYPE_CHECKING:
    from mllm_assets.training.protocol import Reporter

CACHED = "cached"


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePlan:
    """What will be cached, and for what will not, why.

    Attributes:
        tower: Whether the vision tower's output is read from the cache.
        boundary: The text layer whose input is read from the cache, or None.
        facts: For people: `vision_features` and `hidden_states`, each "cached" or the reason why not.
    """

    tower: bool
    boundary: int | None
    facts: Mapping[str, str]


@dataclass(kw_only=True, slots=True)
class Cached:
    """What stands in the model's places while it trains, and the batches that go with it."""

    collator: Collator
    taken: list[str] = field(default_factory=list)


def plan(shape: TrainableSet, spec: TrainSpec, settings: CacheSettings, inputs: Inputs, precision: Precision,
         *, num_processes: int = 1) -> CachePlan:  # fmt: skip
    """Decide from the model's shape, which may be on `meta`, what will be cached."""
    no_tower = _why_no_tower(shape, spec, settings, inputs, num_processes)
    boundary = _boundary(shape, spec, settings, inputs, precision, num_processes)
    return CachePlan(
        tower=no_tower is None,
        boundary=boundary if isinstance(boundary, int) else None,
        facts={
            "vision_features": no_tower or CACHED,
            "hidden_states": f"{CACHED} below layer {boundary}" if isinstance(boundary, int) else boundary,
        },
    )


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
    )


def _why_no_tower(
    shape: TrainableSet, spec: TrainSpec, settings: CacheSettings, inputs: Inputs, num_processes: int
) -> str | None:
    if settings.features_dir is not None:
        return None  # an upstream step has them, and `tower.install` refuses them where the tower trains
    if settings.features_root is None:
        return "turned off (feature_cache: false)"
    if shape.tower_trains:
        return "the vision tower trains, so its output changes at every step"
    if tower.tower_is_random(shape.model.config):
        return "the vision tower has dropout, so its output differs from step to step"
    if not any(row.images for row in inputs.images):
        return "no row has an image"
    return _visited_once(spec, inputs, num_processes)


def _boundary(
    shape: TrainableSet, spec: TrainSpec, settings: CacheSettings, inputs: Inputs, precision: Precision,
    num_processes: int,
) -> int | str:  # fmt: skip
    if settings.hidden_states_root is None:
        return "turned off (feature_cache: false)"
    if shape.model.config.model_type != "gemma3":
        return f"only the hidden states of Gemma 3 are cached, and this model is {shape.family.name}"
    if spec.packs:
        return "rows are packed, so what enters a layer depends on what a row is packed with"
    text = shape.model.config.text_config
    boundary = hidden_states.first_trained_layer(shape.names, text.num_hidden_layers)
    if isinstance(boundary, str):
        return boundary
    if text.attention_dropout > 0 or tower.tower_is_random(shape.model.config):
        return "the frozen layers have dropout, so their output differs from step to step"
    if reason := _visited_once(spec, inputs, num_processes):
        return reason
    needed_gib = hidden_states.num_bytes(inputs.images, text.hidden_size, precision) / GIB
    if needed_gib > settings.max_hidden_states_gib:
        return (
            f"they would take {needed_gib:.1f} GiB on disk, above the limit of {settings.max_hidden_states_gib:g} GiB "
            f"(max_hidden_states_gib)"
        )
    free_gib = _free_bytes(settings.hidden_states_root) / GIB
    if needed_gib > free_gib / 2:
        return f"they would take {needed_gib:.1f} GiB, more than half of the {free_gib:.1f} GiB that are free on disk"
    return boundary


def _visited_once(spec: TrainSpec, inputs: Inputs, num_processes: int) -> str | None:
    """Computing all rows beforehand costs more than steps that visit each at most once, as with few `max_steps`."""
    samples = spec.per_device_train_batch_size * spec.gradient_accumulation_steps * num_processes
    visits = spec.max_steps * samples / len(inputs.train_rows) if spec.max_steps > 0 else spec.num_train_epochs
    return f"the run visits a row {visits:.2g} times, so nothing is used twice" if visits <= 1 else None


def _free_bytes(directory: Path) -> int:
    there = next(path for path in (directory, *directory.parents) if path.exists())
    return shutil.disk_usage(there).free


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
    work = _Work(
        settings, spec, inputs, load_model(model_dir, dtype=precision.weights), device_kind, precision, reporter
    )
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
