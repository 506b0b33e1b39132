"""Train a recipe from the command line: the same run, folder and worker as the checkpoint asset, without Dagster."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_assets.artifacts import read_manifest
from mllm_assets.data.curate.leaks import datasets_share_no_image, earlier_stages
from mllm_assets.data.curate.register import judging_entries
from mllm_assets.data.quality.store import QualityStore
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.layout import Layout
from mllm_assets.recipe.load import Recipe
from mllm_assets.training.runs.models import find_adapters
from mllm_assets.training.runs.plan import plan_run, point_latest, published_note, reopen_if_damaged, shown_overrides
from mllm_assets.worker.launch import run_worker
from mllm_assets.worker.run_settings import RunSettings
from mllm_assets.worker.tasks import Accelerator, CacheSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalRun:
    """A finished run and whether it was trained now."""

    directory: Path
    manifest: Mapping[str, Any]
    trained_now: bool
    overrides: Mapping[str, Any]

    def describe(self) -> str:
        facts = self.manifest
        done = "trained" if self.trained_now else "was finished already, nothing was trained again"
        losses = f"loss {facts['final_loss']:.4f}" + (f", eval {facts['eval_loss']:.4f}" if facts["eval_loss"] else "")
        losses += f", reward {facts['final_reward']:.4f}" if "final_reward" in facts else ""
        losses += "".join(f", {name} {value:.4f}" for name, value in facts.get("eval_answers", {}).items())
        steps = f"{facts['num_steps']} steps" + published_note(facts)
        lines = [f"{self.directory} {done}: {steps}, {losses}", f"model: {self.directory / 'model'}"]
        if self.overrides:
            run = f"{self.directory.parent.name} {shown_overrides(self.overrides)}"
            lines.append(f"`latest` is of the recipe as written; of this run: mllm-assets summary {run}")
        return "\n".join(lines)


def train(
    recipe: Recipe,
    layout: Layout,
    accelerator: Accelerator,
    *,
    warn: Callable[[str], None],
    force: bool = False,
    feature_cache: bool = True,
    settings: RunSettings = RunSettings(),
) -> LocalRun:
    """Train, resume, or return a finished run.

    `warn` is called before training if the recipe evaluates on pictures that another dataset or stage trains on, and
    if a finished run's model was changed, so that it is made again. With `feature_cache` the output of the frozen parts
    is kept below `cache/` for the next run.

    Raises:
        MllmAssetsError: Recipe, data, model or machine must change.
        WorkerCrashed: The trainer ended otherwise; the same call resumes.
    """
    dataset = Dataset.of_recipe(recipe.spec, layout.root, read_part=None)
    apart = datasets_share_no_image(
        dataset,
        recipe.spec.train_entries,
        [*recipe.spec.eval_entries, *judging_entries(dataset, recipe.spec.eval_entries)],
        store=QualityStore(layout.quality_db),
        stages=earlier_stages(
            layout.root / recipe.spec.model_name_or_path, find_adapters(recipe, layout.root), layout.root
        ),
    )
    if not apart.passed:
        warn(f"{recipe.path.name}: {apart.description}")
    plan = plan_run(
        recipe,
        root=layout.root,
        dataset=dataset,
        force=force,
        num_processes=accelerator.num_processes,
        settings=settings,
    )
    del dataset  # frees its rows while the worker trains
    plan = reopen_if_damaged(plan, warn)
    if plan.state != "finished":
        caches = CacheSettings(weights_root=layout.frozen_weights, estimates_root=layout.memory_estimates)
        if feature_cache:
            caches = replace(caches, features_root=layout.features, hidden_states_root=layout.hidden_states)
        run_worker(replace(plan.task, caches=caches, accelerator=accelerator))
    point_latest(plan)
    return LocalRun(
        directory=plan.directory,
        manifest=read_manifest(plan.directory),
        trained_now=plan.state != "finished",
        overrides=plan.task.overrides,
    )
