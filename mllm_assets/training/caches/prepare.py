"""The caches that replace the frozen parts of a model during training: their output is computed once.

What a step does not need is not in memory either: its weights are dropped when the cache replaces it, and read again
from the model's directory when the trained model is published.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mllm_assets.disk import free_on
from mllm_assets.errors import IntegrityError
from mllm_assets.families.family import FAMILIES
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.caches import features, hidden_states, tower
from mllm_assets.training.encoding.collate import Collator
from mllm_assets.training.encoding.inputs import Inputs, make_collator
from mllm_assets.training.models.device import GIB, Device, Precision
from mllm_assets.training.models.freezing import TrainableSet
from mllm_assets.training.models.load import load_model
from mllm_assets.training.models.load_parts import load_modules
from mllm_assets.training.models.quantization import quantizing_device
from mllm_assets.worker.protocol import num_ranks, rank
from mllm_assets.worker.tasks import CacheSettings, Part

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

CACHED = "cached"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """A run before any weight is loaded."""

    spec: TrainSpec
    model_dir: Path  # that it starts from
    inputs: Inputs
    device: Device
    precision: Precision
    shape: TrainableSet  # on `meta`
    caches: CacheSettings
    adapters: tuple[Path, ...] = ()  # on the model
    num_processes: int = 1
    checkpointed: bool | None = None  # whether activations are computed twice; None before that is decided
    measured: tuple[str, ...] = ()  # metrics of answers that the model gives while it trains

    def load(self) -> Any:
        """Load the model's weights, and see that they are still those that the run is named by."""
        how = self.precision
        model = load_model(
            self.model_dir,
            dtype=how.weights,
            device=quantizing_device(how.quantization, self.device.kind),
            quantization=how.quantization,
            attention=how.attention,
        )
        self.inputs.digests.require_unchanged()
        return model

    def collator(self, **cached: Any) -> Collator:
        """What makes batches: of pixels, or of what is cached."""
        return make_collator(self.spec, self.inputs.processor, self.inputs.digests, **cached)


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePlan:
    """What will be cached.

    Attributes:
        tower: Whether the vision tower's output is read from the cache.
        boundary: The text layer whose input is read from the cache, or None.
        facts: `vision_features` and `hidden_states`, each "cached" or the reason why not.
    """

    tower: bool
    boundary: int | None
    facts: Mapping[str, str]

    @property
    def is_empty(self) -> bool:
        return not self.tower and self.boundary is None


def fill_caches(plan: CachePlan, setup: Setup, reporter: "Reporter") -> tuple[Collator, Any]:
    """Compute what is missing, and return the collator that reads the caches, and the model.

    Some of it is compared with the model's own output. Every process computes its share and waits for the others.

    Raises:
        IntegrityError: What is cached is damaged or not what this model computes.
        RecipeError: What is cached trains.
        DataError: An image is damaged.
    """
    if plan.tower:
        tower.require_frozen(setup.shape.names, setup.shape.family)
    cached, model = {}, setup.load()
    if not plan.is_empty:
        if plan.boundary is not None:
            cached["hidden_states"] = _filled_hidden_states(plan.boundary, model, setup, reporter, plan=plan)
        else:
            cached["features"] = _filled_features(model, setup, reporter)
        if setup.spec.fsdp or setup.spec.deepspeed:  # they spread a model that is on no device yet
            del model
            model = setup.load()
    return setup.collator(**cached), model


def _filled_features(model: Any, setup: Setup, reporter: "Reporter") -> features.FeatureStore:
    fingerprint = tower.tower_fingerprint(model, setup.inputs.processor, setup.spec, setup.precision, setup.device.kind)
    directory = setup.caches.features_dir or Path(str(setup.caches.features_root)) / fingerprint
    if directory.name != fingerprint:
        raise IntegrityError(
            f"The vision features in {directory} are of tower {directory.name}, and this model's is {fingerprint}: "
            f"weights, image size limits, precision or library versions differ. Make them again."
        )
    tower.move(model, setup.device.kind)
    maker = features.FeatureMaker(
        model=model,
        collator=setup.collator(),
        precision=setup.precision,
        num_workers=setup.spec.dataloader_num_workers,
    )
    store, rows = features.FeatureStore(directory, setup.inputs.digests), setup.inputs.rows
    if setup.caches.features_dir is None:
        images = features.visuals_by_name(rows, setup.inputs.digests)
        store.compute(maker, images, reporter, part=Part(index=rank(), count=num_ranks()))
    store.require_match(maker, rows)
    return store


def _filled_hidden_states(
    boundary: int, model: Any, setup: Setup, reporter: "Reporter", *, plan: CachePlan
) -> hidden_states.HiddenStateStore:
    rows, processor = setup.inputs.rows, setup.inputs.processor
    fingerprint = hidden_states.prefix_fingerprint(
        model, boundary, processor, setup.spec, setup.precision, setup.device.kind
    )
    store = hidden_states.HiddenStateStore(
        Path(str(setup.caches.hidden_states_root)) / fingerprint, setup.inputs.digests
    )
    model.to(setup.device.kind)
    collator = setup.collator()
    prefix = hidden_states.Prefix(model=model, boundary=boundary, collator=collator, precision=setup.precision)
    if store.missing(store.name(row) for row in rows):
        faster, own_tower = prefix, None
        if plan.tower:
            collator = setup.collator(features=_filled_features(model, setup, reporter))
            faster, own_tower = replace(prefix, collator=collator), tower.install(model)
        store.compute(faster, rows, reporter, part=Part(index=rank(), count=num_ranks()))
        if own_tower is not None:
            tower.uninstall(model, own_tower)
    store.require_match(prefix, rows)
    return store


def install_caches(model: Any, plan: CachePlan) -> None:
    """Replace the modules whose output is cached."""
    if not plan.is_empty:
        tower.install(model)
    if plan.boundary is not None:
        hidden_states.install(model, plan.boundary)


def restore_modules(model: Any, plan: CachePlan, model_dir: Path, dtype: torch.dtype) -> None:
    """Put the modules that `install_caches` replaced back into the trained model, without LoRA, from `model_dir`.

    `dtype` is that of frozen weights in this run, so that cached and uncached runs publish the same bytes.
    """
    if plan.is_empty:
        return
    replaced = tower.paths(model)
    if plan.boundary is not None:
        layers = (f"{hidden_states.LAYERS}.{index}" for index in range(plan.boundary))
        replaced += ["model.multi_modal_projector", *layers]
    device = model.lm_head.weight.device
    modules = {path: module.to(device) for path, module in load_modules(model_dir, replaced, dtype).items()}
    tower.uninstall(model, {path: modules.pop(path) for path in tower.paths(model)})
    for path, module in modules.items():
        model.set_submodule(path, module)
    model.main_input_name = type(model).main_input_name


def plan_caches(setup: Setup) -> CachePlan:
    """Decide from the model's shape, which may be on `meta`, what will be cached."""
    no_tower = _why_no_tower(setup)
    boundary = _boundary(setup)
    return CachePlan(
        tower=no_tower is None,
        boundary=boundary if isinstance(boundary, int) else None,
        facts={
            "vision_features": no_tower or CACHED,
            "hidden_states": f"{CACHED} below layer {boundary}" if isinstance(boundary, int) else boundary,
        },
    )


def _why_no_tower(setup: Setup) -> str | None:
    shape, settings = setup.shape, setup.caches
    if settings.features_dir is not None:
        return None  # an upstream step has them, and `tower.require_frozen` refuses them if the tower trains
    if settings.features_root is None:
        return "turned off (feature_cache: false)"
    if shape.family.vision_cut is None:
        return f"the vision features of {shape.family.name} are not cached"
    if shape.tower_trains:
        return "the vision tower trains, so its output changes at every step"
    if tower.tower_has_dropout(shape.model.config):
        return "the vision tower has dropout, so its output differs from step to step"
    if not any(setup.inputs.rows.counted(kind).any() for kind in ("images", "videos")):
        return "no row has an image"
    return _visited_once(setup)


def _boundary(setup: Setup) -> int | str:
    shape, settings = setup.shape, setup.caches
    if settings.hidden_states_root is None:
        return "turned off (feature_cache: false)"
    if not shape.family.caches_hidden_states:
        known = ", ".join(family.name for family in FAMILIES.values() if family.caches_hidden_states)
        return f"only the hidden states of {known} are cached, and this model is {shape.family.name}"
    if setup.measured or setup.spec.learns_rewards:
        return "the model answers while it trains, and a new token goes through all layers"
    if setup.spec.packs:
        return "rows are packed, so what enters a layer depends on what a row is packed with"
    if len(setup.adapters) > setup.spec.continues_adapter:
        return "adapters are merged into the model, whose own files the frozen layers would be read from"
    if setup.spec.neftune_noise_alpha is not None:
        return "neftune_noise_alpha adds noise to what enters the layers, other noise at every step"
    text = shape.model.config.text_config
    boundary = hidden_states.first_trained_layer(shape.names, text.num_hidden_layers)
    if isinstance(boundary, str):
        return boundary
    if text.attention_dropout > 0 or tower.tower_has_dropout(shape.model.config):
        return "the frozen layers have dropout, so their output differs from step to step"
    if reason := _visited_once(setup):
        return reason
    needed_gib = hidden_states.num_bytes(setup.inputs.rows, text.hidden_size, setup.precision) / GIB
    if needed_gib > settings.max_hidden_states_gib:
        return (
            f"they would take {needed_gib:.1f} GiB on disk, above the limit of {settings.max_hidden_states_gib:g} GiB "
            f"(max_hidden_states_gib)"
        )
    free_gib = free_on(settings.hidden_states_root) / GIB
    if needed_gib > free_gib / 2:
        return f"they would take {needed_gib:.1f} GiB, more than half of the {free_gib:.1f} GiB that are free on disk"
    return boundary


def _visited_once(setup: Setup) -> str | None:
    """Computing all rows beforehand costs more than steps that visit each at most once, as with few `max_steps`."""
    spec, num_rows = setup.spec, len(setup.inputs.train_rows)
    samples = spec.per_device_train_batch_size * spec.gradient_accumulation_steps * setup.num_processes
    visits = spec.max_steps * samples / num_rows if spec.max_steps > 0 else spec.num_train_epochs
    if spec.learns_rewards:
        visits *= 2 * spec.num_generations  # answers are drawn, and then learnt
    return f"the run visits a row {visits:.2g} times, so nothing is used twice" if visits <= 1 else None
