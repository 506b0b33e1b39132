"""`<recipe>/benchmarks`: the base and the tuned model on benchmarks of lmms-eval."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg

from mllm_assets import __version__
from mllm_assets.artifacts import digest_json, path_inside
from mllm_assets.components.assets.lineage import as_trained, model_directory, upstream, upstream_path
from mllm_assets.components.assets.step import step
from mllm_assets.components.reporting import in_window, rounded
from mllm_assets.components.resources import AcceleratorResource, ProjectResource
from mllm_assets.components.wiring import Node
from mllm_assets.errors import DataError, RecipeError
from mllm_assets.evaluation.benchmarks import Compared, folder_digest, publish_benchmarks
from mllm_assets.evaluation.lmms_eval import LmmsEval, find_lmms_eval
from mllm_assets.layout import Layout
from mllm_assets.worker.benchmark_task import TRIED, BenchmarkSettings, BenchmarkTask


def benchmarks_asset(node: Node, settings: BenchmarkSettings) -> dg.AssetsDefinition:
    """Both models are asked by lmms-eval, one after another; what one was asked before is not asked again."""

    @dg.asset(
        key=node.key("benchmarks"),
        group_name="evaluate",
        kinds={"json"},
        deps=[node.key("checkpoint"), node.model],
        pool="gpu",
        code_version=digest_json(settings.identity())[:16],
        description=f"{node.name}: the base and the tuned model on {', '.join(settings.tasks)}, asked by lmms-eval; "
        "gains with paired intervals.",
    )
    @step
    def benchmarks(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        layout = project.layout
        if node.recipe.spec.learns_scores:
            raise RecipeError(f"{node.name} is a reward model, which gives no answers. Delete its benchmarks.")
        installed = find_lmms_eval(layout.root, settings.python)
        if installed.version != TRIED:
            context.log.warning(f"lmms-eval {installed.version} is installed; {TRIED} was tried.")
        folder = _folder(layout, settings)
        tuned = upstream(context, node.key("checkpoint"))
        upstream_path(context, node.key("checkpoint"), project)
        models = {
            "base": (model_directory(context, node, project), upstream(context, node.model)["data_version"]),
            "tuned": (layout.root / tuned["model_path"], tuned["data_version"]),
        }
        asked: dict[str, BenchmarkTask] = {}
        for name, (directory, digest) in models.items():
            asked[name] = _task(context, node, settings, installed, folder, layout, (name, directory, digest))
            gpu.run(context, asked[name])
        compared = publish_benchmarks(layout, node.name, asked["base"].directory, asked["tuned"].directory)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(compared.digest),
            metadata={
                "benchmarks": in_window(compared.markdown()),
                **_numbers(compared),
                "num_samples": sum(one["num_samples"] for one in compared.tasks.values()),
                "lmms_eval": installed.version,
                "weights_digest": tuned["data_version"],
                "path": layout.relative(compared.directory),
            },
        )

    return benchmarks


def _folder(layout: Layout, settings: BenchmarkSettings) -> Path | None:
    if settings.folder is None:
        return None
    folder = path_inside(layout.root, settings.folder, what="benchmarks.folder")
    if not folder.is_dir():
        raise DataError(f"benchmarks.folder is {settings.folder}, and {folder} is not a directory. Correct it.")
    return folder


def _task(
    context: dg.AssetExecutionContext,
    node: Node,
    settings: BenchmarkSettings,
    installed: LmmsEval,
    folder: Path | None,
    layout: Layout,
    model: tuple[str, Path, str],
) -> BenchmarkTask:
    """The worker's task; its directory is named by everything that the answers depend on."""
    spec, (name, directory, digest) = as_trained(context, node), model
    lineage: dict[str, Any] = {
        "engine_version": __version__,
        "lmms_eval": installed.version,
        "model": digest,
        "turns": asdict(spec.turns),
        "benchmarks": settings.identity(),
        "folder": folder_digest(folder) if folder else None,
    }
    return BenchmarkTask(
        recipe=spec,
        model=name,
        model_dir=directory,
        model_digest=digest,
        settings=settings,
        python=installed.python,
        root=layout.root,
        folder=folder,
        directory=layout.evaluations / digest_json(lineage)[:16],
        lineage=lineage,
    )


def _numbers(compared: Compared) -> dict[str, float]:
    """The tuned model's figures and its gains, so that Dagster plots them over time."""
    found: dict[str, float] = {}
    for task, one in compared.tasks.items():
        for metric, row in one["metrics"].items():
            found[f"{task}_{metric}"] = rounded(row["tuned"])
            if row["gain"] is not None:
                found[f"{task}_{metric}_gain"] = rounded(row["gain"]["mean"])
    return found
