"""Which frozen parts of a run are computed once, and why the others are not."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.training import hidden_states, tower
from mllm_assets.training.cache_settings import CacheSettings
from mllm_assets.training.device import GIB, Precision
from mllm_assets.training.freezing import TrainableSet
from mllm_assets.training.inputs import Inputs
from mllm_assets.training.spec import TrainSpec

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


def plan_caches(shape: TrainableSet, spec: TrainSpec, settings: CacheSettings, inputs: Inputs, precision: Precision,
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
