"""Train a recipe from the command line: the same run, folder and worker as the checkpoint asset, without Dagster."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import read_manifest
from mllm_assets.data.leaks import datasets_share_no_image
from mllm_assets.data.stages import stages_behind
from mllm_assets.layout import Layout
from mllm_assets.quality.store import QualityStore
from mllm_assets.training.cache_settings import CacheSettings
from mllm_assets.training.launch import run_worker
from mllm_assets.training.model_directory import require_published
from mllm_assets.training.recipe import load_recipe
from mllm_assets.training.runs import plan_run, point_latest, train_request


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalRun:
    """A finished run and whether it was trained now."""

    directory: Path
    manifest: Mapping[str, Any]
    trained_now: bool

    def describe(self) -> str:
        facts = self.manifest
        done = "trained" if self.trained_now else "was finished already, nothing was trained again"
        losses = f"loss {facts['final_loss']:.4f}" + (f", eval {facts['eval_loss']:.4f}" if facts["eval_loss"] else "")
        return f"{self.directory} {done}: {facts['num_steps']} steps, {losses}\nmodel: {self.directory / 'model'}"


def train(
    recipe_path: Path,
    overrides: Sequence[str],
    layout: Layout,
    accelerator: Mapping[str, Any],
    *,
    warn: Callable[[str], None],
    force: bool = False,
    feature_cache: bool = True,
    regroup: bool = False,
) -> LocalRun:
    """Train, resume, or return a finished run.

    `warn` is told, before it trains, where the recipe evaluates on pictures that another dataset or stage trains on.
    With `feature_cache` what the frozen parts compute is kept below `cache/`, and found there by the next run. With
    `regroup` a step's samples are regrouped into the largest micro-batch that fits.

    Raises:
        MllmAssetsError: Recipe, data, model or machine must change, or a finished run's model was changed.
        WorkerCrashed: The trainer ended otherwise; the same call resumes.
    """
    recipe = load_recipe(recipe_path, overrides)
    apart = datasets_share_no_image(
        layout.root / recipe.spec.dataset_dir,
        recipe.spec.train_entries,
        recipe.spec.eval_entries,
        store=QualityStore(layout.quality_db),
        stages=stages_behind(layout.root / recipe.spec.model_name_or_path, layout.root),
    )
    if not apart.passed:
        warn(f"{recipe.path.name}: {apart.description}")
    plan = plan_run(
        recipe, root=layout.root, force=force, num_processes=int(accelerator["num_processes"]), regroup=regroup
    )
    if plan.state == "finished":
        require_published(plan.directory)
    else:
        cache = CacheSettings(features_root=layout.features, hidden_states_root=layout.hidden_states)
        run_worker(train_request(plan, cache=cache if feature_cache else None, accelerator=accelerator))
    point_latest(plan)
    return LocalRun(
        directory=plan.directory, manifest=read_manifest(plan.directory), trained_now=plan.state != "finished"
    )
