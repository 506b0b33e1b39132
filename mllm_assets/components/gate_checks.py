"""The gates of a release as Dagster's checks: each blocks what is downstream, and a release judges all again."""

from collections.abc import Iterable, Mapping, Sequence

import dagster as dg

from mllm_assets.artifacts import read_manifest
from mllm_assets.components.lineage import upstream_path
from mllm_assets.components.resources import ProjectResource
from mllm_assets.components.wiring import Node
from mllm_assets.data.leaks import release_leaks
from mllm_assets.data.stages import stages_of
from mllm_assets.evaluation.gates import GATES, GateResult

RELOADS = "checkpoint_reloads_strictly"
OF_METRICS = tuple(name for name in GATES if name != RELOADS)  # what `eval_metrics` can judge


def gate_specs(key: dg.AssetKey, names: Iterable[str]) -> list[dg.AssetCheckSpec]:
    return [dg.AssetCheckSpec(name, asset=key, blocking=True, description=GATES[name]) for name in names]


def gate_checks(results: Sequence[GateResult], names: Iterable[str]) -> list[dg.AssetCheckResult]:
    """Outcomes as Dagster's. A gate that had nothing to judge, because nothing is released yet, passes."""
    judged = {result.name: result for result in results}
    return [_check(name, judged.get(name)) for name in names]


def _check(name: str, result: GateResult | None) -> dg.AssetCheckResult:
    if result is None:
        text = "Nothing of this recipe is released yet."
        return dg.AssetCheckResult(check_name=name, passed=True, description=text)
    figures = {"observed": result.observed, "threshold": result.threshold}
    return dg.AssetCheckResult(
        check_name=name,
        passed=result.passed,
        severity=dg.AssetCheckSeverity.ERROR if result.required else dg.AssetCheckSeverity.WARN,
        description=result.description,
        metadata={figure: value for figure, value in figures.items() if value is not None},
    )


def find_leaks(
    context: dg.AssetExecutionContext, node: Node, project: ProjectResource, evaluated_digests: Mapping[str, str]
) -> list[str]:
    """What leaked from the evaluation into the training, looked for in the files on disk; empty is well.

    Args:
        context: Of the step.
        node: The recipe in the graph.
        project: Where things lie.
        evaluated_digests: `entry_digest` of each evaluation entry when the model was asked.
    """
    spec = node.recipe.spec
    run = read_manifest(upstream_path(context, node.key("checkpoint"), project))
    return release_leaks(
        project.layout.root / spec.dataset_dir,
        spec.train_entries,
        spec.eval_entries,
        run["data_digests"],
        evaluated_digests,
        store=project.quality_store,
        stages=stages_of(run, project.layout.root)[:-1],
    )
