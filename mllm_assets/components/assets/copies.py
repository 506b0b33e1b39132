"""`<recipe>/quantized`: the current release in another form, and whether it answers as the release does."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from mllm_assets.artifacts import digest_json, is_sound, read_manifest
from mllm_assets.components.assets.lineage import pull_data
from mllm_assets.components.assets.step import step
from mllm_assets.components.reporting import in_window
from mllm_assets.components.resources import AcceleratorResource, ProjectResource
from mllm_assets.components.wiring import Node
from mllm_assets.evaluation.agreement import ANSWERS_ALIKE, Agreement
from mllm_assets.layout import Layout
from mllm_assets.releases.copies import CopyTask, QuantizeTask, copy_of
from mllm_assets.releases.model_card import without_front_matter
from mllm_assets.releases.versions import find_release

CLAIM = "The copy makes the release's prompts, and its greedy answers and its loss are near enough to the release's."


def quantized_asset(node: Node, asked_for: Agreement) -> dg.AssetsDefinition:
    """The release with 8-bit weights, for vLLM and transformers."""
    key = node.key("quantized")

    @dg.asset(
        key=key,
        group_name="release",
        kinds={"pytorch"},
        deps=[node.key("released_model"), *node.eval_data.values()],
        pool="gpu",
        code_version=digest_json([asked_for.min_agreement, asked_for.max_loss_distance_nats])[:16],
        check_specs=[dg.AssetCheckSpec(ANSWERS_ALIKE, asset=key, blocking=True, description=CLAIM)],
        description=f"{node.name}: the current release with 8-bit weights in compressed-tensors' format, which vLLM "
        "and transformers read, and its answers beside the release's.",
    )
    @step
    def quantized(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        task = _task(context, node, project, QuantizeTask, asked_for)
        manifest = _made(context, project, gpu, task)
        return _result(manifest, task, project.layout)

    return quantized


def _task(
    context: dg.AssetExecutionContext,
    node: Node,
    project: ProjectResource,
    kind: type[CopyTask],
    asked_for: Agreement,
) -> CopyTask:
    pull_data(context, sorted(set(node.eval_data.values())), project)
    if mirror := project.mirror(context):
        mirror.follow_current(node.name)
    release = find_release(project.layout, node.name)  # after a rollback not the one that was made last
    return copy_of(kind, project.layout, node.name, release, next(iter(node.eval_data)), asked_for)


def _made(
    context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource, task: CopyTask
) -> Mapping[str, Any]:
    if is_sound(task.directory):
        context.log.info(f"{project.layout.relative(task.directory)} already holds this copy.")
        return read_manifest(task.directory)
    return gpu.run(context, task)


def _result(manifest: Mapping[str, Any], task: CopyTask, layout: Layout) -> dg.MaterializeResult:
    compared = dict(manifest["comparison"])
    rows = compared.pop("rows")
    card = (task.directory / "README.md").read_text(encoding="utf-8")
    alike = sum(row["agrees"] for row in rows)
    text = f"{alike} of {len(rows)} greedy answers are the release's; {compared['min_agreement']:.0%} is asked for."
    if "loss_distance_nats" in compared:
        text += (
            f" The loss is {compared['loss_distance_nats']:.5f} nats from the release's; "
            f"{compared['max_loss_distance_nats']:g} is allowed."
        )
    if compared["num_other_prompts"]:
        text += f" {compared['num_other_prompts']} prompts are others."
    check = dg.AssetCheckResult(
        check_name=ANSWERS_ALIKE, passed=compared.pop("passed"), description=text, metadata=compared
    )
    return dg.MaterializeResult(
        data_version=dg.DataVersion(digest_json(manifest["files"])),
        check_results=[check],
        metadata={
            "version": manifest["version"],
            "model_card": in_window(without_front_matter(card)),
            "size_mib": round(manifest["num_bytes"] / 2**20, 2),
            "size_of_release_mib": round(manifest["num_bytes_of_release"] / 2**20, 2),
            **{name: compared[name] for name in ("agreement", "loss_distance_nats") if name in compared},
            "path": layout.relative(task.directory),
        },
    )
