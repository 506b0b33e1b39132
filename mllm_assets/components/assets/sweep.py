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
from mllm_assets.training.runs.sweep_spec import LOSS, SweepSpec, check_against, shown
from mllm_assets.worker.run_settings import AnswerSample
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
        f"and the best of them by {spec.compared_by[0].key} on eval_dataset as a recipe.",
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
        caches, settings = caches_of(context, node, project), node.settings.for_runs
        settings = replace(settings, answers=replace(settings.answers, metrics=spec.asked))
        planned = partial(
            plan_run,
            root=layout.root,
            dataset=dataset,
            model_dir=model_dir,
            num_processes=gpu.num_training_processes,
            settings=settings,
        )

        def plan(values: Mapping[str, Any]) -> RunPlan:
            trial = partial(planned, load_recipe(node.recipe.path, values))
            found = find_plan(trial, project.mirror(context), context.log.warning)
            # one that was finished before anybody asked has no answers
            if found.state == "finished" and not answered(read_manifest(found.directory), settings.answers):
                return find_plan(partial(trial, force=True), project.mirror(context), context.log.warning)
            return found

        def train(plan: RunPlan, on_poll: OnPoll | None) -> Manifest:
            if plan.state == "finished":
                return read_manifest(plan.directory)
            return gpu.run(context, replace(plan.task, caches=caches), on_poll)

        own = planned(recipe).fingerprint.partition("-")[0]
        name = f"{node.name}/{own}/{digest_json(_choices(spec, settings.answers))[:16]}"
        trials = run_sweep(spec, name, layout.sweeps_db, plan=plan, train=train, notify=context.log.info)
        return _result(publish_sweep(layout, recipe, spec, trials), project, winner_file(recipe))

    return sweep


def answered(manifest: Manifest, answers: AnswerSample) -> bool:
    """Whether a finished run was asked all that a sweep compares, and as much."""
    asked = manifest.get("asked") or {}
    how = {"max_samples": answers.max_samples, "max_new_tokens": answers.max_new_tokens}
    return not answers.metrics or (how.items() <= asked.items() and {*answers.metrics} <= {*asked["metrics"]})


def _choices(spec: SweepSpec, answers: AnswerSample) -> dict[str, Any]:
    """What a study depends on: with more trials or hours the same one goes on."""
    left_out = ["num_trials", "max_hours", "objective", "objectives"]
    choices = {name: value for name, value in asdict(spec).items() if name not in left_out}
    if [objective.key for objective in spec.compared_by] != [LOSS]:
        choices["compared_by"] = [objective.key for objective in spec.compared_by]
    return choices | ({"answers": asdict(answers)} if spec.asked else {})


def _result(directory: Path, project: ProjectResource, winner: str) -> dg.MaterializeResult:
    manifest, layout = read_manifest(directory), project.layout
    drawn = {name: directory / f"{name}.png" for name in PICTURES}
    recipe = (directory / winner).read_text(encoding="utf-8")
    return dg.MaterializeResult(
        data_version=dg.DataVersion(manifest["digest"]),
        metadata={
            "best": shown(manifest["best_values"]),
            **{key: rounded(value) for key, value in manifest["scores"].items()},
            "num_trials": manifest["num_trials"],
            "num_pruned": manifest["num_pruned"],
            "trials": in_window(_table(read_trials(directory), manifest["objectives"])),
            **{
                name: in_window(png_markdown(name, path.read_bytes())) for name, path in drawn.items() if path.is_file()
            },
            "winner": in_window(
                f"To use it: `cp {layout.relative(directory / winner)} configs/`\n\n```yaml\n{recipe}```\n"
            ),
            "path": link(layout.relative(directory)),
        },
    )


def _table(trials: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> str:
    """The trials, the best first, then those that were given up."""
    several = len(objectives) > 1
    return markdown_table(
        ("trial", "values", *objectives, *(["Pareto-best"] if several else []), "step", "what became of it"),
        (
            (
                one["number"],
                shown(one["values"]),
                *(f"{one['scores'][key]:.4f}" if one["scores"] else "" for key in objectives),
                *(["yes" if one["is_unbeaten"] else ""] if several else []),
                one["step"],
                f"{one['state']}: {_short(one['why'])}" if one["why"] else one["state"],
            )
            for one in sorted(trials, key=lambda one: (one["place"] is None, one["place"] or one["number"]))
        ),
    )


def _short(text: str) -> str:
    line = text.splitlines()[0]
    return line if len(line) <= MAX_WHY_SHOWN else f"{line[: MAX_WHY_SHOWN - 1]}…"
