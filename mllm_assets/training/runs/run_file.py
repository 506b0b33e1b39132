"""`run.json`: what a run began with, written once and read by whoever goes on with it or names it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import parse_manifest, write_json_atomic
from mllm_assets.errors import IntegrityError, ModelError, RecipeError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.runs.models import ADAPTER_WEIGHTS

RUN_FILE = "run.json"
RUN_FILE_CURE = "Run: mllm-assets doctor --repair"
DATA_DIGESTS, STARTS_FROM = "data_digests", "starts_from"  # in run.json


def read_run_file(run_dir: Path) -> dict[str, Any]:
    """Return the content of `run.json`; empty for a run that has not begun.

    Raises:
        IntegrityError: It is damaged.
    """
    path = run_dir / RUN_FILE
    try:
        return parse_manifest(path.read_bytes(), str(path), RUN_FILE_CURE) if os.path.lexists(path) else {}
    except OSError as error:  # a folder, or a link to nothing
        raise IntegrityError(f"{path} cannot be read ({error.strerror}). {RUN_FILE_CURE}") from None


def spec_of_run(values: Any, place: Path) -> TrainSpec:
    """The recipe that a run, or a release, was trained with; raises IntegrityError if `place` holds another shape."""
    try:
        return TrainSpec(**values)
    except (TypeError, ValueError, AttributeError, RecipeError) as error:
        raise IntegrityError(f"{place} does not say what it was trained with ({error}). {RUN_FILE_CURE}") from None


@dataclass(frozen=True, slots=True)
class StartingModel:
    """What a run started from: model, its fingerprint at that time (or None), the recipe, and adapters on the model."""

    model_dir: Path
    fingerprint: str | None
    spec: TrainSpec
    adapters: tuple[Path, ...] = ()


def record_starting_model(run_dir: Path, start: StartingModel) -> None:
    """Write the starting model into `run.json`; the path is relative, so that a project can be moved."""
    relative = os.path.relpath(start.model_dir.resolve(), run_dir.resolve())
    values = {"model_dir": relative, "fingerprint": start.fingerprint, "recipe": start.spec.to_dict()}
    if start.adapters:
        values["adapters"] = [os.path.relpath(path.resolve(), run_dir.resolve()) for path in start.adapters]
    pin_setting(run_dir, STARTS_FROM, values)


def read_starting_model(run_dir: Path) -> StartingModel:
    """Return what a run started from.

    Raises:
        ModelError: The run does not record it, or the model is no longer there.
    """
    kept = read_run_file(run_dir).get(STARTS_FROM)
    if not isinstance(kept, dict) or not isinstance(kept.get("model_dir"), str):
        raise ModelError(
            f"{run_dir} does not say which model it started from, so its checkpoints cannot be loaded. Train it again, "
            f"or use its finished model: {run_dir / 'model'}."
        )
    model_dir = (run_dir.resolve() / kept["model_dir"]).resolve()
    if not (model_dir / "config.json").is_file():
        raise ModelError(
            f"The checkpoints of {run_dir} hold only what was trained, and the model that they were trained from is "
            f"no longer in {model_dir}. Put it back there."
        )
    adapters = tuple((run_dir.resolve() / str(path)).resolve() for path in kept.get("adapters") or ())
    for path in adapters:
        if not (path / ADAPTER_WEIGHTS).is_file():
            raise ModelError(
                f"The checkpoints of {run_dir} hold only what was trained, and the adapter that they were trained from "
                f"is no longer in {path}. Put it back there."
            )
    spec = spec_of_run(kept.get("recipe"), run_dir / RUN_FILE)
    return StartingModel(model_dir, kept.get("fingerprint"), spec, adapters)


def pin_setting(run_dir: Path, name: str, value: Any) -> Any:
    """Return the value that a run began with; a run without one begins with `value`, which is written down."""
    chosen = read_run_file(run_dir)
    if name not in chosen:
        write_json_atomic(run_dir / RUN_FILE, {**chosen, name: value})
        return value
    return chosen[name]
