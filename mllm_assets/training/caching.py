"""Which frozen parts of a run are computed once, and the swap that lets training steps run without them.

What a step does not need is not in memory either: its weights are dropped when the cache takes over, and read again
from the model's directory when the trained model is published.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mllm_assets.training import features, hidden_states, tower
from mllm_assets.training.cache_settings import CacheSettings
from mllm_assets.training.collate import Collator
from mllm_assets.training.freezing import TrainableSet
from mllm_assets.training.inputs import Inputs, make_collator
from mllm_assets.training.memory import GIB, Precision
from mllm_assets.training.model import base_model, load_model
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


def _why_no_tower(
    shape: TrainableSet, spec: TrainSpec, settings: CacheSettings, inputs: Inputs, num_processes: int
) -> str | None:
    if settings.features_dir is not None:
        return None  # an upstream step has them, and `tower.install` refuses them where the tower trains
    if settings.features_root is None:
        return "turned off (feature_cache: false)"
    if shape.model.config.model_type != "gemma3":
        return f"the vision features of {shape.model.config.model_type} cannot be cached yet"
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
        return f"the hidden states of {shape.model.config.model_type} cannot be cached yet"
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


def install(
    cache_plan: CachePlan, settings: CacheSettings, spec: TrainSpec, trainable: TrainableSet, inputs: Inputs,
    model_dir: Path, device_kind: str, precision: Precision, reporter: "Reporter",
) -> Cached:  # fmt: skip
    """Compute what is missing, compare some of it with the model's own output, and put it in the model's place.

    Every process computes its share of what is missing and waits for the others.

    Raises:
        IntegrityError: What is cached is damaged or not what this model computes.
        RecipeError: What is cached trains.
        DataError: An image is damaged.
    """
    model = base_model(trainable.model)
    pixels = make_collator(spec, inputs.processor)
    if cache_plan.boundary is not None:
        return _install_hidden_states(
            cache_plan.boundary, cache_plan, settings, spec, trainable, inputs, device_kind, precision, reporter
        )
    if not cache_plan.tower:
        return Cached(collator=pixels)
    reader = _feature_reader(settings, spec, model, inputs, device_kind, precision, reporter)
    tower.install(model, trainable.names)
    return Cached(collator=make_collator(spec, inputs.processor, features=reader), taken=[tower.TOWER])


def _feature_reader(
    settings: CacheSettings, spec: TrainSpec, model: Any, inputs: Inputs, device_kind: str, precision: Precision,
    reporter: "Reporter",
) -> features.FeatureReader:  # fmt: skip
    pixels = make_collator(spec, inputs.processor)
    fingerprint = tower.tower_fingerprint(model, inputs.processor, spec, precision)
    directory = settings.features_dir or Path(str(settings.features_root)) / fingerprint
    features.require_fingerprint(directory, fingerprint)
    model.model.vision_tower.to(device_kind)
    try:
        if settings.features_dir is None:
            features.compute_missing(
                model, pixels, features.images_by_digest(inputs.images), directory, precision, reporter,
                num_workers=spec.dataloader_num_workers, part=_part(),
            )  # fmt: skip
        reader = features.FeatureReader(directory)
        features.require_match(reader, model, pixels, inputs.images, precision)
    finally:
        model.model.vision_tower.to("cpu")
    return reader


def _install_hidden_states(
    boundary: int, cache_plan: CachePlan, settings: CacheSettings, spec: TrainSpec, trainable: TrainableSet,
    inputs: Inputs, device_kind: str, precision: Precision, reporter: "Reporter",
) -> Cached:  # fmt: skip
    model = base_model(trainable.model)
    pixels = make_collator(spec, inputs.processor)
    fingerprint = hidden_states.prefix_fingerprint(model, boundary, inputs.processor, spec, precision)
    directory = Path(str(settings.hidden_states_root)) / fingerprint
    wanted = hidden_states.HiddenStateReader(directory)
    model.to(device_kind)
    if wanted.store.missing([wanted.name(row) for row in inputs.images]):
        collator, own_tower = pixels, None
        if cache_plan.tower:
            reader = _feature_reader(settings, spec, model, inputs, device_kind, precision, reporter)
            collator = make_collator(spec, inputs.processor, features=reader)
            own_tower = tower.install(model, trainable.names)
        hidden_states.compute_missing(
            model, boundary, collator, inputs.images, directory, precision, reporter, part=_part()
        )
        if own_tower is not None:
            tower.uninstall(model, own_tower.to(device_kind))
    reader = hidden_states.HiddenStateReader(directory)
    hidden_states.require_match(reader, model, boundary, pixels, inputs.images, precision)
    taken = [
        tower.TOWER,
        "model.multi_modal_projector",
        *(f"{hidden_states.LAYERS}.{index}" for index in range(boundary)),
    ]
    tower.install(model, trainable.names)
    hidden_states.install(model, boundary)
    return Cached(collator=make_collator(spec, inputs.processor, hidden_states=reader), taken=taken)


def restore(model: Any, cached: Cached, model_dir: Path, dtype: torch.dtype) -> None:
    """Put what the caches stood in for back into the trained model, from the model's directory.

    Args:
        model: A `Gemma3ForConditionalGeneration`.
        cached: From `install`.
        model_dir: Where the run started from.
        dtype: Of frozen weights in this run, so that cached and uncached runs publish the same bytes.
    """
    if not cached.taken:
        return
    device = model.lm_head.weight.device
    source = load_model(model_dir)
    for path in cached.taken:
        module = source.get_submodule(path).to(dtype=dtype).to(device).requires_grad_(False)
        if path == tower.TOWER:
            tower.uninstall(model, module)
        else:
            model.set_submodule(path, module)
    model.main_input_name = type(model).main_input_name


def _part() -> tuple[int, int]:
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
