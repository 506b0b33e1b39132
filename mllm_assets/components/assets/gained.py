"""`<recipe>/what_it_gained`: the same recipe without people's corrections, on the same test rows."""

from dataclasses import replace
from functools import partial

import dagster as dg

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json, is_sound, read_manifest
from mllm_assets.components.assets.checkpoint import caches_of, find_plan
from mllm_assets.components.assets.lineage import as_trained, model_directory, pull_data, upstream, upstream_path
from mllm_assets.components.assets.step import step
from mllm_assets.components.reporting import in_window, link
from mllm_assets.components.resources import AcceleratorResource, ProjectResource
from mllm_assets.components.wiring import Node
from mllm_assets.data.curate.register import judging_entries
from mllm_assets.data.curate.uncorrected import Uncorrected, publish_uncorrected
from mllm_assets.data.sharegpt.dataset import Dataset, media_dir_of
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.evaluation.what_it_gained import publish_gained
from mllm_assets.project.read import materialize_command
from mllm_assets.recipe.load import load_recipe
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.training.runs.plan import RunPlan, plan_run
from mllm_assets.worker.tasks import EvaluateTask, EvaluationSettings

NOTHING = "No decision of a person changes what it trains on, so nothing was trained without."


def what_it_gained_asset(node: Node) -> dg.AssetsDefinition:
    """Train the recipe on the source's own answers, and ask both models the same."""
    chosen: EvaluationSettings = node.settings.evaluation.to_spec()
    settings = replace(chosen, unrelated=())

    @dg.asset(
        key=node.key("what_it_gained"),
        group_name="evaluate",
        kinds={"json"},
        deps=list(dict.fromkeys([node.key("predictions"), node.key("checkpoint"), node.model, *node.data])),
        pool="gpu",
        code_version=digest_json(settings.identity())[:16],
        description=f"{node.name}: what people's corrections of its training rows gained. It is trained once more "
        "without them, and both models answer the same questions; gains with paired intervals.",
    )
    @step
    def what_it_gained(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        layout = project.layout
        pull_data(context, node.data, project)
        spec = as_trained(context, node)
        dataset = Dataset.of_recipe(spec, layout.root, read_part=None)
        found = {name: publish_uncorrected(layout, dataset.entry(name)) for name in spec.train_entries}
        source = {name: one for name, one in found.items() if one is not None}
        if not source:
            return dg.MaterializeResult(data_version=dg.DataVersion("no corrections"), metadata={"gained": NOTHING})
        answered = upstream_path(context, node.key("predictions"), project)
        tuned = upstream(context, node.key("predictions"))["weights_digest"]
        if tuned != upstream(context, node.key("checkpoint"))["data_version"]:
            again = materialize_command(f"{node.name}/predictions")
            raise IntegrityError(f"{node.name} was trained again since it answered. Run: {again}")
        plan = _plan(context, node, project, gpu, source)
        if plan.state == "finished":
            trained = read_manifest(plan.directory)
        else:
            caches = replace(caches_of(context, node, project), features_dir=None, features_root=layout.features)
            trained = gpu.run(context, replace(plan.task, caches=caches))
        task = _asking(node, spec, settings, project, plan, trained["weights_digest"])
        if not is_sound(task.directory):
            gpu.run(context, task)
        gained = publish_gained(
            layout, node.name, read_predictions(answered), read_predictions(task.directory),
            {"run_without": plan.fingerprint, "weights_digest": tuned, "without": trained["weights_digest"]},
        )  # fmt: skip
        return dg.MaterializeResult(
            data_version=dg.DataVersion(gained.digest),
            metadata={
                "gained": in_window(gained.markdown()),
                "num_changed": sum(one.num_changed for one in source.values()),
                "num_dropped": sum(one.num_dropped for one in source.values()),
                "run_without": layout.relative(plan.directory),
                "weights_digest": tuned,
                "path": link(layout.relative(gained.directory)),
            },
        )

    return what_it_gained


def _plan(
    context: dg.AssetExecutionContext,
    node: Node,
    project: ProjectResource,
    gpu: AcceleratorResource,
    source: dict[str, Uncorrected],
) -> RunPlan:
    """The run without corrections, of the values that the latest checkpoint was trained with."""
    overrides = upstream(context, node.key("checkpoint")).get("overrides") or {}
    names = [source[name].entry if name in source else name for name in as_trained(context, node).train_entries]
    recipe = load_recipe(node.recipe.path, {**overrides, "dataset": ",".join(names)})
    planned = partial(
        plan_run,
        recipe,
        root=project.layout.root,
        model_dir=model_directory(context, node, project),
        num_processes=gpu.num_processes,
        settings=node.settings.for_runs,
    )
    return find_plan(planned, project.mirror(context), context.log.warning)


def _asking(
    node: Node,
    spec: TrainSpec,
    settings: EvaluationSettings,
    project: ProjectResource,
    plan: RunPlan,
    weights_digest: str,
) -> EvaluateTask:
    """The worker's task: the model without corrections answers what the other was asked."""
    layout = project.layout
    dataset = Dataset.of_recipe(spec, layout.root, read_part=None)
    digests = {name: dataset.entry(name).digest for name in judging_entries(dataset, spec.eval_entries)}
    identity = {"engine_version": __version__, "tuned": weights_digest, "data": digests, **settings.conditions(spec)}
    return EvaluateTask(
        recipe=spec,
        recipe_name=f"{node.name} without corrections",
        entries=tuple(digests),
        model_dir=plan.directory / "model",
        base_model_dir=plan.task.model_dir,
        data_dir=layout.root / spec.dataset_dir,
        media_dir=media_dir_of(spec, layout.root),
        data_digests=digests,
        model_digests={"tuned": weights_digest},
        directory=layout.predictions(node.name, digest_json(identity)[:16]),
        settings=settings,
        models=("tuned",),
        features_root=layout.features if node.has_features else None,
        rows_root=layout.rows,
    )
