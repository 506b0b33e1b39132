"""`<recipe>/checkpoint`."""

from functools import partial
from typing import Any

import dagster as dg
from pydantic import Field

from mllm_assets.artifacts import digest_json, find_damage, read_manifest
from mllm_assets.components.gate_checks import RELOADS, gate_checks, gate_specs
from mllm_assets.components.lineage import bring_data, upstream_path
from mllm_assets.components.reporting import image_markdown, link, shown, table
from mllm_assets.components.resources import AcceleratorResource, ProjectResource, failures_for_people
from mllm_assets.components.starting_model import find_origin, model_directory
from mllm_assets.components.wiring import Node
from mllm_assets.data.checks import CheckOutcome
from mllm_assets.data.leaks import datasets_share_no_image
from mllm_assets.data.stages import stages_behind
from mllm_assets.errors import DataError
from mllm_assets.evaluation.gates import GateSpec, reload_gate
from mllm_assets.evaluation.model_card import Origin
from mllm_assets.evaluation.release_files import PARTS
from mllm_assets.layout import Layout
from mllm_assets.training.cache_settings import DEFAULT_MAX_HIDDEN_STATES_GIB, CacheSettings
from mllm_assets.training.fingerprint import semantic_values
from mllm_assets.training.recipe import Recipe, load_recipe
from mllm_assets.training.runs import RunPlan, plan_run, point_latest, train_request

APART = "datasets_share_no_image"


class CheckpointConfig(dg.Config):
    """What people turn in the launchpad; everything else is in the recipe."""

    max_steps: int | None = Field(default=None, description="Optimizer steps in all; wins over num_train_epochs.")
    num_train_epochs: float | None = Field(default=None, description="Passes over the training data.")
    learning_rate: float | None = Field(default=None, description="Peak learning rate.")
    max_samples: int | None = Field(default=None, description="Use only the first so many samples of each entry.")
    force: bool = Field(
        default=False, description="Train again although this very run is finished; nothing is overwritten."
    )

    def overrides(self) -> dict[str, Any]:
        return {key: value for key, value in self.model_dump(exclude={"force"}).items() if value is not None}


def checkpoint_asset(
    node: Node,
    gates: GateSpec,
    *,
    with_features: bool,
    feature_cache: bool = True,
    max_hidden_states_gib: float = DEFAULT_MAX_HIDDEN_STATES_GIB,
    allow_leakage: bool = False,
    regroup: bool = False,
) -> dg.AssetsDefinition:
    """The trained model. A finished run is returned at once, an unfinished one resumes.

    Args:
        node: The recipe in the graph.
        gates: How far the reloaded model's loss may be from the trained one's.
        with_features: Whether an asset upstream computes the vision features.
        feature_cache: Whether hidden states may be kept.
        max_hidden_states_gib: Most that they may take on disk.
        allow_leakage: Only warn where it is evaluated on pictures that another dataset or stage trains on.
        regroup: Whether micro-batches may be regrouped.
    """
    features = [node.key("vision_features")] if with_features else []

    @dg.asset(
        key=node.key("checkpoint"),
        group_name="train",
        kinds={"pytorch"},
        deps=[*node.data, node.model, *features],
        pool="gpu",
        code_version=digest_json(semantic_values(node.recipe.spec))[:16],
        check_specs=[
            *gate_specs(node.key("checkpoint"), [RELOADS]),
            dg.AssetCheckSpec(
                APART,
                asset=node.key("checkpoint"),
                blocking=True,
                description="No picture of its evaluation entries was trained on, in this stage or in one before it.",
            ),
        ],
        description=_describe(node.recipe),
    )
    def checkpoint(
        context: dg.AssetExecutionContext, config: CheckpointConfig, project: ProjectResource, gpu: AcceleratorResource
    ) -> dg.MaterializeResult:
        layout = project.layout
        with failures_for_people():
            bring_data(context, [*node.data, *node.earlier_data], project)
            recipe = load_recipe(node.recipe.path, config.overrides())
            model_dir = model_directory(context, node, project)
            apart = datasets_share_no_image(
                layout.root / recipe.spec.dataset_dir,
                recipe.spec.train_entries,
                recipe.spec.eval_entries,
                store=project.quality_store,
                stages=stages_behind(model_dir, layout.root),
            )
            if not apart.passed and not allow_leakage:
                # before it trains: the figures would be worth nothing
                raise DataError(f"{recipe.path.name}: {apart.description}")
            origin = find_origin(context, node)
            find_plan = partial(
                plan_run,
                recipe,
                root=layout.root,
                model_dir=model_dir,
                force=config.force,
                num_processes=gpu.num_processes,
                regroup=regroup,
            )
            plan = find_plan()
            if (mirror := project.mirror(context)) and plan.state != "finished" and mirror.bring_runs(plan.directory):
                plan = find_plan()  # another machine finished it
            cache = CacheSettings(
                features_dir=upstream_path(context, features[0], project) if features else None,
                hidden_states_root=layout.hidden_states if feature_cache else None,
                max_hidden_states_gib=max_hidden_states_gib,
            )
        if plan.state == "finished":
            context.log.info(f"{layout.relative(plan.directory)} is finished already: nothing is trained again.")
            result = read_manifest(plan.directory)
        else:
            result = gpu.run(context, train_request(plan, cache=cache))
        point_latest(plan)
        return project.recorded(context, _checkpoint_result(plan, result, layout, apart, gates, origin))

    return checkpoint


def _describe(recipe: Recipe) -> str:
    lines = [f"{recipe.path.name}: {recipe.spec.finetuning_type}, from {recipe.spec.model_name_or_path}."]
    return "\n\n".join([*lines, *(f"Note: {note}" for note in recipe.notes)])


def _checkpoint_result(
    plan: RunPlan,
    result: dict[str, Any],
    layout: Layout,
    apart: CheckOutcome,
    gates: GateSpec,
    origin: Origin,
) -> dg.MaterializeResult:
    columns = {"module": "string", "num_tensors": "int", "num_params": "int", "share": "float"}
    plot = plan.directory / "training_loss.png"
    # a run that was finished before may have been changed since
    damage = find_damage(plan.directory, only=PARTS) if plan.state == "finished" else None
    [check] = gate_checks([reload_gate(result["reload"], damage, gates)], [RELOADS])
    return dg.MaterializeResult(
        data_version=dg.DataVersion(result["weights_digest"]),
        check_results=[
            check._replace(metadata={**check.metadata, **result["reload"]}),
            dg.AssetCheckResult(
                check_name=APART,
                passed=apart.passed,
                severity=dg.AssetCheckSeverity.WARN,  # what is no warning has failed before it trained
                description=apart.description,
                metadata=apart.metadata,
            ),
        ],
        metadata={
            "training_loss": image_markdown(plot) if plot.is_file() else "no plot: set plot_loss: true",
            "final_loss": shown(result["final_loss"]),
            **({"eval_loss": shown(result["eval_loss"])} if result["eval_loss"] is not None else {}),
            "num_steps": result["num_steps"],
            **{f"{name}_run": link(run["url"]) for name, run in result["trackers"].items()},
            "train_wall_s": shown(result["train_wall_s"]),
            "samples_per_s": shown(result["samples_per_s"]),
            "tokens_per_s": shown(result["tokens_per_s"]),
            "peak_memory_gib": shown(result["peak_memory_gib"]),
            "memory_estimate_gib": shown(result["memory_estimate_gib"]),
            "num_trainable_params": result["num_trainable_params"],
            **({"quantization": result["quantization"]} if result.get("quantization") else {}),
            "model_path": layout.relative(plan.directory / result["model_dir"]),
            "path": layout.relative(plan.directory),
            "fingerprint": plan.fingerprint,
            "base_model": dg.MetadataValue.json(origin["base_model"]),
            "pretrained_model": dg.MetadataValue.json(origin["pretrained_model"]),
            "already_finished": plan.state == "finished",
            "warnings": dg.MetadataValue.json(result["warnings"]),
            "caches": dg.MetadataValue.json(result["caches"]),
            "device": dg.MetadataValue.json(result["device"]),
            "trainable": table(result["trainable"], columns),
        },
    )
