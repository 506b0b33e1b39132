"""`<recipe>/quantized` and `<recipe>/gguf`: the current release in another form, and whether it answers alike."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from mllm_assets.artifacts import digest_json, is_sound, read_manifest
from mllm_assets.components.assets.lineage import pull_data
from mllm_assets.components.assets.step import step
from mllm_assets.components.reporting import in_window
from mllm_assets.components.resources import AcceleratorResource, ProjectResource
from mllm_assets.components.wiring import Node
from mllm_assets.evaluation.agreement import ANSWERS_ALIKE
from mllm_assets.layout import Layout
from mllm_assets.releases.copies import CopyTask, GgufSpec, GgufTask, QuantizedSpec, QuantizeTask, copy_of
from mllm_assets.releases.model_card import without_front_matter
from mllm_assets.releases.versions import Release, find_release

CLAIM = "The copy makes the release's prompts, and its greedy answers and its loss are near enough to the release's."


def quantized_asset(node: Node, spec: QuantizedSpec) -> dg.AssetsDefinition:
    """The release with 8-bit weights, for vLLM and transformers."""
    key = node.key("quantized")

    @dg.asset(
        key=key,
        group_name="release",
        kinds={"pytorch"},
        deps=[node.key("released_model"), *node.eval_data.values()],
        pool="gpu",
        code_version=digest_json([spec.weights, spec.min_agreement, spec.max_loss_distance_nats])[:16],
        check_specs=[dg.AssetCheckSpec(ANSWERS_ALIKE, asset=key, blocking=True, description=CLAIM)],
        description=f"{node.name}: the current release with 8-bit weights in compressed-tensors' format, which vLLM "
        "and transformers read, and its answers beside the release's.",
    )
    @step
    def quantized(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        release = _release(context, node, project)
        entry, how = next(iter(node.eval_data)), {"weights": spec.weights}
        task = copy_of(QuantizeTask, project.layout, release, entry, spec.agreement, **how)
        return _result(_made(context, project, gpu, task), task, project.layout)

    return quantized


def gguf_asset(node: Node, spec: GgufSpec) -> dg.AssetsDefinition:
    """The release for llama.cpp and what is built on it."""
    key = node.key("gguf")

    @dg.asset(
        key=key,
        group_name="release",
        kinds={"gguf"},
        deps=[node.key("released_model"), *node.eval_data.values()],
        pool="gpu",
        code_version=digest_json([spec.outtype, spec.min_agreement])[:16],
        check_specs=[dg.AssetCheckSpec(ANSWERS_ALIKE, asset=key, blocking=True, description=CLAIM)],
        description=f"{node.name}: the current release as GGUF, text model and projector, by llama.cpp's converter, "
        "and its answers in llama.cpp beside the release's.",
    )
    @step
    def gguf(
        context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        converter = spec.converter(project.layout.root)
        release = _release(context, node, project)
        entry, how = next(iter(node.eval_data)), {"converter": converter, "outtype": spec.outtype}
        task = copy_of(GgufTask, project.layout, release, entry, spec.agreement, **how)
        return _result(_made(context, project, gpu, task), task, project.layout)

    return gguf


def _release(context: dg.AssetExecutionContext, node: Node, project: ProjectResource) -> Release:
    pull_data(context, sorted(set(node.eval_data.values())), project)
    if mirror := project.mirror(context):
        mirror.follow_current(node.name)
    return find_release(project.layout, node.name)  # after a rollback not the one that was made last


def _made(
    context: dg.AssetExecutionContext, project: ProjectResource, gpu: AcceleratorResource, task: CopyTask
) -> Mapping[str, Any]:
    if is_sound(task.directory):
        context.log.info(f"{project.layout.relative(task.directory)} already holds this copy.")
        return read_manifest(task.directory)
    return gpu.run(context, task)


def _result(manifest: Mapping[str, Any], task: CopyTask, layout: Layout) -> dg.MaterializeResult:
    compared = manifest["comparison"] or {}
    card = (task.directory / "README.md").read_text(encoding="utf-8")
    return dg.MaterializeResult(
        data_version=dg.DataVersion(digest_json(manifest["files"])),
        check_results=[_check(manifest)],
        metadata={
            "version": manifest["version"],
            "model_card": in_window(without_front_matter(card)),
            "size_mib": round(manifest["num_bytes"] / 2**20, 2),
            "size_of_release_mib": round(manifest["num_bytes_of_release"] / 2**20, 2),
            **{name: compared[name] for name in ("agreement", "loss_distance_nats") if name in compared},
            "not_compared": manifest.get("not_compared", ""),
            "path": layout.relative(task.directory),
        },
    )


def _check(manifest: Mapping[str, Any]) -> dg.AssetCheckResult:
    """What the comparison found; a copy that could not be compared did not pass, and stops nothing."""
    if manifest["comparison"] is None:
        return dg.AssetCheckResult(
            check_name=ANSWERS_ALIKE,
            passed=False,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"Not compared: {manifest['not_compared']}",
        )
    figures = {name: value for name, value in manifest["comparison"].items() if name not in ("rows", "passed")}
    rows = manifest["comparison"]["rows"]
    alike = sum(row["agrees"] for row in rows)
    text = f"{alike} of {len(rows)} greedy answers are the release's; {figures['min_agreement']:.0%} is asked for."
    if "loss_distance_nats" in figures:
        allowed = figures["max_loss_distance_nats"]
        text += f" The loss is {figures['loss_distance_nats']:.5f} nats from the release's; {allowed:g} is allowed."
    if figures["num_other_prompts"]:
        text += f" {figures['num_other_prompts']} prompts are others."
    passed = manifest["comparison"]["passed"]
    return dg.AssetCheckResult(check_name=ANSWERS_ALIKE, passed=passed, description=text, metadata=figures)
