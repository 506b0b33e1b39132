"""`<recipe>/checkpoint`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field, create_model

from mllm_assets.artifacts import digest_json, read_manifest
from mllm_assets.components.assets.lineage import find_origin, model_directory, pull_data, upstream_path
from mllm_assets.components.assets.step import step
from mllm_assets.components.facts import fitted
from mllm_assets.components.reporting import RELOADS, gate_checks, gate_specs, in_window, link, png_markdown, rounded
from mllm_assets.components.resources import AcceleratorResource, ProjectResource
from mllm_assets.components.slots import RUN_TAG, run_tags
from mllm_assets.components.wiring import Node
from mllm_assets.data.curate.checks import CheckOutcome
from mllm_assets.data.curate.leaks import datasets_share_no_image, earlier_stages
from mllm_assets.data.curate.register import judging_entries
from mllm_assets.data.quality.report import markdown_table
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import DataError
from mllm_assets.evaluation.gates import GateSpec, reload_gate
from mllm_assets.layout import Layout
from mllm_assets.recipe.load import Recipe, load_recipe
from mllm_assets.releases.model_card import Origin
from mllm_assets.store.checkpoints import checkpoints_sent, fetch_checkpoints
from mllm_assets.store.mirror import Mirror
from mllm_assets.training.runs.history import folded
from mllm_assets.training.runs.models import find_adapters
from mllm_assets.training.runs.plan import (
    RunPlan,
    overridden,
    plan_run,
    point_latest,
    reopen_if_damaged,
    require_overridable,
    semantic_values,
)
from mllm_assets.worker.tasks import CacheSettings, Manifest

RECIPE_FILE = "recipe_file"  # of the metadata in the definition
NO_SHARED_IMAGE = "datasets_share_no_image"


class CheckpointConfig(dg.Config):
    """The settings of the launchpad, which opens with those of the recipe."""

    max_steps: int | None = Field(default=None, description="Optimizer steps; above 0, num_train_epochs has no effect.")
    num_train_epochs: float | None = Field(default=None, description="Passes over the training data.")
    learning_rate: float | None = Field(default=None, description="Peak learning rate.")
    per_device_train_batch_size: int | None = Field(default=None, description="Samples in a step, on each device.")
    seed: int | None = Field(default=None, description="Of the order of the samples, and of new weights.")
    max_samples: int | None = Field(default=None, description="Use only the first so many samples of each entry.")
    other: dict[str, Any] | None = Field(
        default=None, description="Other keys of the recipe, for example lora_rank: 16."
    )
    force: bool = Field(
        default=False, description="Train again although this very run is finished; nothing is overwritten."
    )

    def overrides(self) -> dict[str, Any]:
        """The values that the run has instead of the recipe's."""
        written = {name: field.default for name, field in type(self).model_fields.items()}
        values = self.model_dump(exclude={"force", "other"})
        changed = {key: value for key, value in values.items() if value is not None and value != written[key]}
        return changed | (self.other or {})


def _config_of(node: Node) -> type[CheckpointConfig]:
    """The settings with the recipe's own values as defaults."""
    fields: dict[str, Any] = {
        name: (field.annotation, Field(default=getattr(node.recipe.spec, name), description=field.description))
        for name, field in CheckpointConfig.model_fields.items()
        if name not in ("force", "other")
    }
    return create_model("CheckpointConfig", __base__=CheckpointConfig, **fields)


def checkpoint_asset(node: Node) -> dg.AssetsDefinition:
    """The trained model. A finished run is returned at once, an unfinished one resumes."""
    settings, gates = node.settings, node.gates
    features = [node.key("vision_features")] if node.has_features else []
    config_class = _config_of(node)

    @dg.asset(
        key=node.key("checkpoint"),
        group_name="train",
        kinds={"pytorch"},
        deps=list(dict.fromkeys([*node.data, node.model, *node.adapters, *features])),
        pool="gpu",
        code_version=digest_json(semantic_values(node.recipe.spec))[:16],
        check_specs=[*gate_specs(node.key("checkpoint"), [RELOADS]), _leak_check_spec(node)],
        metadata=fitted({RECIPE_FILE: str(node.recipe.path)}),
        description=_describe(node.recipe),
    )
    @step
    def checkpoint(
        context: dg.AssetExecutionContext,
        config: config_class,  # pyright: ignore[reportInvalidTypeForm]
        project: ProjectResource,
        gpu: AcceleratorResource,
    ) -> dg.MaterializeResult:
        layout = project.layout
        pull_data(context, [*node.data, *node.ancestor_data], project)
        recipe = load_recipe(node.recipe.path, config.overrides())
        require_overridable(recipe)
        for note in (note for note in recipe.notes if note not in node.recipe.notes):
            context.log.warning(note)
        if (values := overridden(recipe)) and RUN_TAG not in context.run.tags:  # from the launchpad
            context.instance.add_run_tags(context.run_id, run_tags(node.name, values))
        model_dir = model_directory(context, node, project)
        for key in node.adapters:
            upstream_path(context, key, project)
        dataset = Dataset.of_recipe(recipe.spec, layout.root, read_part=None)
        leak_check = check_for_leaks(recipe, model_dir, dataset, project, allowed=settings.allow_leakage)
        origin = find_origin(context, node)
        planned = partial(
            plan_run,
            recipe,
            root=layout.root,
            dataset=dataset,
            model_dir=model_dir,
            force=config.force,
            num_processes=gpu.num_training_processes,
            settings=settings.for_runs,
        )
        plan = find_plan(planned, project.mirror(context), context.log.warning)
        del dataset, planned  # the rows, while the worker trains
        caches = caches_of(context, node, project)
        mirror = project.mirror(context) if gpu.may_lose_machines else None
        result = _train(context, gpu, plan, caches, layout, mirror)
        return _checkpoint_result(plan, result, layout, leak_check, gates, origin)

    return checkpoint


def caches_of(context: dg.AssetExecutionContext, node: Node, project: ProjectResource) -> CacheSettings:
    """What the runs of a recipe may cache, and the features that an asset computed."""
    settings = node.settings
    return CacheSettings(
        features_dir=upstream_path(context, node.key("vision_features"), project) if node.has_features else None,
        hidden_states_root=project.layout.hidden_states if settings.feature_cache else None,
        weights_root=project.layout.frozen_weights,
        estimates_root=project.layout.memory_estimates,
        max_hidden_states_gib=settings.max_hidden_states_gib,
    )


def _leak_check_spec(node: Node) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(
        NO_SHARED_IMAGE,
        asset=node.key("checkpoint"),
        blocking=True,
        description="No picture of its evaluation entries was trained on, in this stage or in one before it.",
    )


def check_for_leaks(
    recipe: Recipe, model_dir: Path, dataset: Dataset, project: ProjectResource, *, allowed: bool
) -> CheckOutcome:
    """Check before training: where a picture leaked, the metrics would be worthless."""
    outcome = datasets_share_no_image(
        dataset,
        recipe.spec.train_entries,
        [*recipe.spec.eval_entries, *judging_entries(dataset, recipe.spec.eval_entries)],
        store=project.quality_store,
        stages=earlier_stages(model_dir, find_adapters(recipe, project.layout.root), project.layout.root),
    )
    if not outcome.passed and not allowed:
        raise DataError(f"{recipe.path.name}: {outcome.description}")
    return outcome


def find_plan(plan: Callable[[], RunPlan], mirror: Mirror | None, warn: Callable[[str], None]) -> RunPlan:
    found = reopen_if_damaged(plan(), warn)
    if mirror and found.state != "finished" and mirror.pull_runs(found.directory):
        return plan()  # another machine finished it
    return found


def _train(
    context: dg.AssetExecutionContext,
    gpu: AcceleratorResource,
    plan: RunPlan,
    caches: CacheSettings,
    layout: Layout,
    mirror: Mirror | None,
) -> Manifest:
    """Train, unless the run is finished; return the run's manifest. With `mirror` its checkpoints are sent as well."""
    if plan.state == "finished":
        context.log.info(f"{layout.relative(plan.directory)} is already finished: nothing is trained again.")
        result = read_manifest(plan.directory)
    elif mirror is None:
        result = gpu.run(context, replace(plan.task, caches=caches))
    else:
        fetch_checkpoints(mirror, plan.directory)
        with checkpoints_sent(mirror, plan.directory, context.log.warning):
            result = gpu.run(context, replace(plan.task, caches=caches))
    point_latest(plan)
    return result


def _describe(recipe: Recipe) -> str:
    lines = [f"{recipe.path.name}: {recipe.spec.finetuning_type}, from {recipe.spec.model_name_or_path}."]
    return "\n\n".join([*lines, *(f"Note: {note}" for note in recipe.notes)])


def _checkpoint_result(
    plan: RunPlan,
    result: Manifest,
    layout: Layout,
    leak_check: CheckOutcome,
    gates: GateSpec,
    origin: Origin,
) -> dg.MaterializeResult:
    plot = plan.directory / "training_loss.png"
    [check] = gate_checks([reload_gate(result["reload"], None, gates)], [RELOADS])
    return dg.MaterializeResult(
        data_version=dg.DataVersion(result["weights_digest"]),
        check_results=[
            check._replace(metadata={**check.metadata, **result["reload"]}),
            dg.AssetCheckResult(
                check_name=NO_SHARED_IMAGE,
                passed=leak_check.passed,
                severity=dg.AssetCheckSeverity.WARN,  # what is more than a warning failed before training
                description=leak_check.description,
                metadata=leak_check.metadata,
            ),
        ],
        metadata={
            **(
                {"training_loss": in_window(png_markdown("training_loss", plot.read_bytes()))} if plot.is_file() else {}
            ),
            "final_loss": rounded(result["final_loss"]),
            **({"eval_loss": rounded(result["eval_loss"])} if result["eval_loss"] is not None else {}),
            **{f"eval_{name}": rounded(value) for name, value in result.get("eval_answers", {}).items()},
            **({"final_reward": rounded(result["final_reward"])} if "final_reward" in result else {}),
            "num_steps": result["num_steps"],
            "published_step": result.get("published_step", result["num_steps"]),
            **{f"{name}_run": link(run["url"]) for name, run in result["trackers"].items()},
            "train_wall_s": rounded(result["train_wall_s"]),
            "samples_per_s": rounded(result["samples_per_s"]),
            "tokens_per_s": rounded(result["tokens_per_s"]),
            **({"padding_share": rounded(share)} if (share := result.get("padding_share")) is not None else {}),
            "peak_memory_gib": rounded(result["peak_memory_gib"]),
            "memory_estimate_gib": rounded(result["memory_estimate_gib"]),
            "num_trainable_params": result["num_trainable_params"],
            **({"quantization": result["quantization"]} if result.get("quantization") else {}),
            "model_path": layout.relative(plan.directory / result["model_dir"]),
            "path": layout.relative(plan.directory),
            "fingerprint": plan.fingerprint,
            **({"overrides": dg.MetadataValue.json(plan.task.overrides)} if plan.task.overrides else {}),
            "base_model": dg.MetadataValue.json(origin["base_model"]),
            "pretrained_model": dg.MetadataValue.json(origin["pretrained_model"]),
            "already_finished": plan.state == "finished",
            "warnings": dg.MetadataValue.json(result["warnings"]),
            "caches": dg.MetadataValue.json(result["caches"]),
            "device": dg.MetadataValue.json(result["device"]),
            "trainable": in_window(_trainable_markdown(result["trainable"], result["num_params"])),
        },
    )


def _trainable_markdown(trainable: Sequence[Mapping[str, Any]], num_params: int) -> str:
    """What trains, equal layers in one row, with its share of all parameters of the model."""
    return markdown_table(
        ("module", "tensors", "parameters", "share"),
        (
            (name, f"{tensors:,}", f"{params:,}", f"{params / num_params:.2%}")
            for name, tensors, params in folded(trainable)
        ),
    )
