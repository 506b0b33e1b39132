"""`<recipe>/sweep`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets.artifacts import digest_json, read_manifest
from mllm_assets.components.assets.checkpoint import caches_of, check_for_leaks, find_plan
from mllm_assets.components.assets.lineage import model_directory, pull_data, upstream_path
from mllm_assets.components.assets.step import step
from mllm_assets.components.reporting import in_window, link, png_markdown, rounded
from mllm_assets.components.resources import AcceleratorResource, ProjectResource
from mllm_assets.components.wiring import Node
from mllm_assets.data.quality.report import markdown_table
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.recipe.load import load_recipe
from mllm_assets.training.runs.plan import RunPlan, plan_run, semantic_values
from mllm_assets.training.runs.sweep import OnPoll, run_sweep
from mllm_assets.training.runs.sweep_result import PICTURES, publish_sweep, read_trials, winner_file
from mllm_assets.training.runs.sweep_spec import SweepSpec, check_against, shown
from mllm_assets.worker.tasks import Manifest

MAX_WHY_SHOWN = 80


def sweep_asset(node: Node, spec: SweepSpec) -> dg.AssetsDefinition:
    """The recipe with other values, and the best of them. All trials share the features of the frozen tower."""
    features = [node.key("vision_features")] if node.has_features else []

    @dg.asset(
        key=node.key("sweep"),
        group_name="train",
        kinds={"optuna"},
        deps=list(dict.fromkeys([*node.data, node.model, *node.adapters, *features])),
        pool="gpu",
        code_version=digest_json([asdict(spec), semantic_values(node.recipe.spec)])[:16],
        description=f"{node.name}: at most {spec.num_trials} runs with other values of {', '.join(spec.parameters)}, "
        "and the one with the lowest loss on eval_dataset as a recipe.",
    )
    @step
    def sweep(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        layout = project.layout
        pull_data(context, [*node.data, *node.ancestor_data], project)
        recipe = load_recipe(node.recipe.path)
        check_against(spec, recipe)
        model_dir = model_directory(context, node, project)
        for key in node.adapters:
            upstream_path(context, key, project)
        dataset = Dataset.of_recipe(recipe.spec, layout.root, read_part=None)
        check_for_leaks(recipe, model_dir, dataset, project, allowed=node.settings.allow_leakage)
        caches = caches_of(context, node, project)
        planned = partial(
            plan_run,
            root=layout.root,
            dataset=dataset,
            model_dir=model_dir,
            num_processes=gpu.num_training_processes,
            settings=node.settings.for_runs,
        )

        def plan(values: Mapping[str, Any]) -> RunPlan:
            trial = load_recipe(node.recipe.path, values)
            return find_plan(partial(planned, trial), project.mirror(context), context.log.warning)

        def train(plan: RunPlan, on_poll: OnPoll | None) -> Manifest:
            if plan.state == "finished":
                return read_manifest(plan.directory)
            return gpu.run(context, replace(plan.task, caches=caches), on_poll)

        name = f"{node.name}/{plan({}).fingerprint}/{digest_json(_choices(spec))[:16]}"
        trials = run_sweep(spec, name, layout.sweeps_db, plan=plan, train=train, notify=context.log.info)
        return _result(publish_sweep(layout, recipe, spec, trials), project, winner_file(recipe))

    return sweep


def _choices(spec: SweepSpec) -> dict[str, Any]:
    """What a study depends on: with more trials or hours the same one goes on."""
    return {name: value for name, value in asdict(spec).items() if name not in ("num_trials", "max_hours")}


def _result(directory: Path, project: ProjectResource, winner: str) -> dg.MaterializeResult:
    manifest, layout = read_manifest(directory), project.layout
    drawn = {name: directory / f"{name}.png" for name in PICTURES}
    recipe = (directory / winner).read_text(encoding="utf-8")
    return dg.MaterializeResult(
        data_version=dg.DataVersion(manifest["digest"]),
        metadata={
            "best": shown(manifest["best_values"]),
            "eval_loss": rounded(manifest["eval_loss"]),
            "num_trials": manifest["num_trials"],
            "num_pruned": manifest["num_pruned"],
            "trials": in_window(_table(read_trials(directory))),
            **{
                name: in_window(png_markdown(name, path.read_bytes())) for name, path in drawn.items() if path.is_file()
            },
            "winner": in_window(
                f"To use it: `cp {layout.relative(directory / winner)} configs/`\n\n```yaml\n{recipe}```\n"
            ),
            "path": link(layout.relative(directory)),
        },
    )


def _table(trials: Sequence[Mapping[str, Any]]) -> str:
    """The trials, the best first, then those that were given up."""
    ordered = sorted(trials, key=lambda one: (one["eval_loss"] is None, one["eval_loss"] or 0.0, one["number"]))
    return markdown_table(
        ("trial", "values", "eval_loss", "step", "what became of it"),
        (
            (
                one["number"],
                shown(one["values"]),
                "" if one["eval_loss"] is None else f"{one['eval_loss']:.4f}",
                one["step"],
                f"{one['state']}: {_short(one['why'])}" if one["why"] else one["state"],
            )
            for one in ordered
        ),
    )


def _short(text: str) -> str:
    line = text.splitlines()[0]
    return line if len(line) <= MAX_WHY_SHOWN else f"{line[: MAX_WHY_SHOWN - 1]}…"
