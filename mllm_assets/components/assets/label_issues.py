"""`<dataset>/label_issues`: which training rows a person should look at first."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import dagster as dg

from mllm_assets.artifacts import UNNAMED, digest_json, is_sound, read_manifest, slug
from mllm_assets.components.assets.lineage import model_directory, pull_data
from mllm_assets.components.assets.step import step
from mllm_assets.components.reporting import failing_asset, in_line, in_window, link
from mllm_assets.components.resources import AcceleratorResource, ProjectResource
from mllm_assets.components.switches import off_asset
from mllm_assets.components.wiring import Node
from mllm_assets.components.yaml_model import YamlModel
from mllm_assets.data.quality.report import markdown_table
from mllm_assets.data.sharegpt.dataset import Dataset, media_dir_of
from mllm_assets.errors import RecipeError, did_you_mean
from mllm_assets.evaluation.label_issues import (
    Issue,
    IssueRows,
    LabelIssuesSpec,
    caption_issues,
    duplicate_groups,
    issues_directory,
    label_issues,
    publish_issues,
    read_issues,
    require_cleanlab,
    rows_of,
)
from mllm_assets.layout import Layout
from mllm_assets.recipe.load import load_recipe
from mllm_assets.training.runs.fold_plan import assign_folds
from mllm_assets.training.runs.plan import RunPlan, plan_run
from mllm_assets.worker.fold_task import FoldsTask, LooksTask
from mllm_assets.worker.tasks import CacheSettings, FeaturesTask

MAX_SHOWN = 50
# of the recipe only what learns: nothing is evaluated, published or reported, and a row is one sequence
_ALONE = {
    "eval_strategy": "no", "eval_dataset": None, "val_size": 0.0, "load_best_model_at_end": False,
    "early_stopping_steps": None, "packing": False, "neat_packing": False, "plot_loss": False, "report_to": "none",
    "resume_from_checkpoint": None, "max_samples": None,
}  # fmt: skip


def label_issues_assets(
    wanted: Mapping[str, YamlModel], nodes: Sequence[Node], off: Mapping[str, str]
) -> list[dg.AssetsDefinition]:
    """An asset for each dataset that wants one; one whose recipe is not there, or does not train on it, fails."""
    found = []
    for dataset, setting in wanted.items():
        try:
            asset, node = _asset_of(dataset, setting.to_spec(), nodes)
        except RecipeError as error:
            found.append(failing_asset(dg.AssetKey([dataset, "label_issues"]), error))
            continue
        asset = asset.map_asset_specs(lambda one, dataset=dataset: in_line(one, dataset))
        found.append(off_asset(asset, off[node.name]) if node.name in off else asset)
    return found


def _asset_of(dataset: str, spec: LabelIssuesSpec, nodes: Sequence[Node]) -> tuple[dg.AssetsDefinition, Node]:
    by_name = {node.name: node for node in nodes}
    node = by_name.get(slug(spec.recipe, UNNAMED))
    if node is None:
        near = did_you_mean(spec.recipe, by_name)
        raise RecipeError(f"{dataset}: label_issues names {spec.recipe!r}, which no recipe is called. {near}")
    entries = [entry for entry, made_by in node.train_data.items() if made_by.path[0] == dataset]
    if not entries or not node.recipe.spec.copies_answers:
        raise RecipeError(
            f"{dataset}: label_issues names {spec.recipe}, which does not learn this dataset's answers. Name a recipe "
            "whose `dataset` has its training entry."
        )
    return label_issues_asset(dataset, spec, node, entries), node


def label_issues_asset(dataset: str, spec: LabelIssuesSpec, node: Node, entries: Sequence[str]) -> dg.AssetsDefinition:
    """The training rows in the order in which a person should look at them."""

    @dg.asset(
        key=[dataset, "label_issues"],
        group_name="curate",
        kinds={"duckdb"},
        deps=list(dict.fromkeys([*node.data, node.model])),
        pool="gpu",
        code_version=digest_json(asdict(spec))[:16],
        description=f"Training rows of {dataset} by how unlikely their answers are to models that did not see them, "
        f"in DuckDB: `mllm-assets review {dataset}` begins with the first.",
    )
    @step
    def issues(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        layout = project.layout
        pull_data(context, node.data, project)
        recipe = load_recipe(node.recipe.path, {**_ALONE, "max_steps": spec.max_steps, "save_steps": spec.max_steps})
        data = Dataset.of_recipe(recipe.spec, layout.root, read_part=None)
        rows = rows_of(data, entries, duplicate_groups(project.quality_store, dataset))
        if rows.labels:
            require_cleanlab()
        plan = plan_run(recipe, root=layout.root, dataset=data, model_dir=model_directory(context, node, project))
        identity = [plan.fingerprint.partition("-")[0], asdict(spec), sorted(rows.groups.items())]
        directory = issues_directory(layout, node.name, identity)
        if is_sound(directory):
            context.log.info(f"{layout.relative(directory)} already holds this ranking.")
            ranked = read_issues(directory)
        else:
            ranked = _ranked(context, gpu, spec, rows, plan, layout)
        publish_issues(
            directory, ranked, dataset=dataset, recipe=node.name, store=project.quality_store, run_id=context.run_id
        )
        manifest = read_manifest(directory)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(manifest["digest"]),
            metadata={
                "num_rows": manifest["num_rows"],
                "num_suspect": manifest["num_suspect"],
                "judged_by": "labels, out of fold" if rows.labels else "loss against rows that look alike, out of fold",
                "first": in_window(_table(ranked[:MAX_SHOWN])),
                "review": f"mllm-assets review {dataset}",
                "path": link(layout.relative(directory)),
            },
        )

    return issues


def _ranked(
    context: dg.AssetExecutionContext,
    gpu: AcceleratorResource,
    spec: LabelIssuesSpec,
    rows: IssueRows,
    plan: RunPlan,
    layout: Layout,
) -> list[Issue]:
    """Ask what looks at the pictures alone, and for captions the recipe without each fold."""
    task, number = plan.task, {label: place for place, label in enumerate(rows.labels)}
    frozen = replace(task.recipe, freeze_vision_tower=True)
    features = FeaturesTask(
        recipe=frozen,
        model_dir=task.model_dir,
        data_dir=task.data_dir,
        media_dir=media_dir_of(frozen, layout.root),
        features_root=layout.features,
    )
    looks = gpu.run(
        context,
        LooksTask(
            features=features,
            groups=dict(rows.groups),
            labels={row_id: number[answer] for row_id, answer in rows.answers.items()} if rows.labels else {},
            num_folds=spec.num_folds,
        ),
    )
    if rows.labels:
        return label_issues(rows, looks.probabilities)
    ids = list(rows.answers)
    groups = [rows.groups[row_id] for row_id in ids]
    folds = dict(zip(ids, assign_folds(groups, groups, num_folds=spec.num_folds), strict=True))
    folds |= {copy: folds[original] for copy, original in rows.copies.items()}
    caches = CacheSettings(features_root=layout.features)
    directory = layout.folds / digest_json([plan.fingerprint, sorted(folds.items())])[:16]
    run = replace(task, caches=caches, notes=(), resume_from=None)
    said = gpu.run(context, FoldsTask(run=run, directory=directory, folds=folds, asked=tuple(ids)))
    shutil.rmtree(directory, ignore_errors=True)
    return caption_issues(rows, said.losses, looks.neighbours)


def _table(issues: Sequence[Issue]) -> str:
    return markdown_table(("sample", "answer", "why"), ((one.sample_id, one.given, one.reason) for one in issues))
