"""Worker tasks on given data and models, with the digests that a plan would give them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_assets.data.sharegpt.dataset import entry_digests
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.runs.models import checkpoint_digest, find_model, is_checkpoint, model_fingerprint
from mllm_assets.worker.tasks import (
    Accelerator,
    CacheSettings,
    EvaluateTask,
    EvaluationSettings,
    FeaturesTask,
    TrainTask,
)

ONE_CPU_THREAD = Accelerator(device="cpu", num_threads=1)


def training(
    recipe: TrainSpec, *, model_dir: Path, data_dir: Path, run_dir: Path, cache_dir: Path | None = None, **fields: Any
) -> TrainTask:
    """A run; with `cache_dir` it may cache vision features and hidden states there."""
    entries = dict.fromkeys((*recipe.train_entries, *recipe.eval_entries))
    caches = CacheSettings(features_root=cache_dir / "features", hidden_states_root=cache_dir / "hidden_states") if (
        cache_dir) else CacheSettings()  # fmt: skip
    known = {
        "recipe_name": "r",
        "fingerprint": "f",
        "stages": (),
        "data_digests": entry_digests(data_dir, entries),
        "pretrained_fingerprint": model_fingerprint(model_dir),
        "caches": caches,
        "rows_root": (cache_dir or run_dir.parent) / "rows",
        "accelerator": ONE_CPU_THREAD,
    }
    return TrainTask(recipe=recipe, model_dir=model_dir, data_dir=data_dir, run_dir=run_dir, **{**known, **fields})


def features_of(task: TrainTask, features_root: Path) -> FeaturesTask:
    """The vision features of a run."""
    return FeaturesTask(
        recipe=task.recipe,
        model_dir=task.model_dir,
        data_dir=task.data_dir,
        features_root=features_root,
        accelerator=task.accelerator,
    )


def _named(model_dir: Path) -> str:
    directory = find_model(model_dir)
    return checkpoint_digest(directory) if is_checkpoint(directory) else model_fingerprint(directory)


def evaluation(
    *,
    model_dir: Path,
    data_dir: Path,
    directory: Path,
    base_model_dir: Path | None = None,
    recipe: TrainSpec | None = None,
    entries: Sequence[str] = ("gemma3_vlm_val",),
    template: str = "gemma3",
    features_root: Path | None = None,
    recipe_name: str = "r",
    accelerator: Accelerator = ONE_CPU_THREAD,
    **settings: Any,
) -> EvaluateTask:
    """Predictions; by default of a recipe that only names the entries."""
    own = TrainSpec(
        model_name_or_path="model", dataset=entries[0], eval_dataset=",".join(entries), template=template, do_train=True
    )
    return EvaluateTask(
        recipe=recipe or own,
        recipe_name=recipe_name,
        entries=(recipe or own).eval_entries,
        model_dir=model_dir,
        base_model_dir=base_model_dir or model_dir,
        data_dir=data_dir,
        data_digests=entry_digests(data_dir, (recipe or own).eval_entries),
        model_digests={"tuned": _named(model_dir), "base": _named(base_model_dir or model_dir)},
        directory=directory,
        settings=EvaluationSettings(**settings),
        features_root=features_root,
        accelerator=accelerator,
    )
