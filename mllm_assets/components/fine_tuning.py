"""Every recipe in `configs/` as assets: features, checkpoint, predictions, metrics, release."""

import dagster as dg
from pydantic import Field

from mllm_assets.artifacts import slug
from mllm_assets.components.alerting import failure_alert
from mllm_assets.components.automation_yaml import Freshness, ReleaseWatch, Retraining
from mllm_assets.components.component_secrets import refused_for_secret
from mllm_assets.components.image_text_dataset import ImageTextDataset
from mllm_assets.components.pretrained_model import Model, PretrainedModels
from mllm_assets.components.recipe_assets import (
    EvaluationSettings,
    RecipeSettings,
    build_recipe_assets,
    hand_written_asset,
)
from mllm_assets.components.recipe_files import read_recipes
from mllm_assets.components.release_watch import released_model_regression
from mllm_assets.components.reporting import failing_asset
from mllm_assets.components.retraining import retraining_job, weekly_retraining
from mllm_assets.components.wiring import Node, Surroundings, hand_written_entries, lines_of, resolve, split_circles
from mllm_assets.errors import MllmAssetsError
from mllm_assets.evaluation.gates import GateSpec
from mllm_assets.evaluation.hub_push import PushSpec
from mllm_assets.layout import Layout
from mllm_assets.training.cache_settings import DEFAULT_MAX_HIDDEN_STATES_GIB


class Evaluation(dg.Model, dg.Resolvable):
    """How predictions are made."""

    max_new_tokens: int = 64
    do_sample: bool = Field(default=False, description="Draw tokens in place of taking the likeliest.")
    temperature: float = Field(default=1.0, description="Of the drawing.", gt=0)
    top_p: float = Field(
        default=1.0, description="Draw from the likeliest tokens that together have this share.", gt=0, le=1
    )
    seed: int = Field(default=42, description="Of the drawing.")
    batch_size: int = 16
    max_samples: int | None = Field(default=None, description="Validation samples to use; all by default.")


class Gates(dg.Model, dg.Resolvable):
    """What a model must show before it is released: lower ends of 95 % intervals. Null keeps the default."""

    min_loss_gain_nats: float | None = Field(default=None, description="How far its loss is below the base model's.")
    min_answer_gain: float | None = Field(
        default=None, description="How far its accuracy is above the constant answer's."
    )
    min_image_gain_nats: float | None = Field(default=None, description="How far the true image lowers its loss.")
    max_regression_nats: float | None = Field(default=None, description="How far its loss may be above the release's.")
    max_reload_difference: float | None = Field(
        default=None, description="How far, relatively, the reloaded checkpoint's loss may be from the trained one's."
    )


class PushToHub(dg.Model, dg.Resolvable):
    """Where the release goes on the Hugging Face Hub. HF_TOKEN of the environment is the only credential."""

    repo_id: str = Field(description="owner/name of a model repository; made where it is not there.")
    private: bool = Field(default=True, description="The repository must be seen by its owner only.")
    revision: str | None = Field(default=None, description="Branch; the default branch if null.")
    dry_run: bool = Field(default=True, description="Only say what would be pushed.")


class Settings(dg.Model, dg.Resolvable):
    """Settings of one recipe that LLaMA-Factory has no key for."""

    feature_cache: bool = Field(
        default=True, description="Keep what the frozen parts compute, the vision tower first, and train from it."
    )
    max_hidden_states_gib: float = Field(
        default=DEFAULT_MAX_HIDDEN_STATES_GIB,
        description="Most disk that one recipe's hidden states may take; above it they are computed in every step.",
    )
    allow_leakage: bool = Field(
        default=False,
        description="Only warn, train and release all the same, where an evaluation entry holds pictures that were "
        "trained on: of another dataset, an earlier stage, or a split that was given (strategy guide, val_split). The "
        "model card says so.",
    )
    regroup_micro_batches: bool = Field(
        default=False,
        description="Regroup batch size x accumulation into the largest micro-batch that fits. The loss is a mean of "
        "micro-batch means, so it changes a little from LLaMA-Factory's.",
    )
    evaluation: Evaluation = Evaluation()
    gates: Gates = Gates()
    push_to_hub: PushToHub | None = Field(
        default=None, description="Makes <recipe>/hub_model, which pushes the current release."
    )

    def to_domain(self) -> RecipeSettings:
        return RecipeSettings(
            feature_cache=self.feature_cache,
            max_hidden_states_gib=self.max_hidden_states_gib,
            allow_leakage=self.allow_leakage,
            regroup_micro_batches=self.regroup_micro_batches,
            evaluation=EvaluationSettings(**self.evaluation.model_dump()),
            gates=GateSpec(**self.gates.model_dump(exclude_none=True)),
            push_to_hub=PushSpec(**self.push_to_hub.model_dump()) if self.push_to_hub else None,
        )


class RecipeOverride(Settings):
    """Settings of one recipe, in place of the defaults."""

    recipe: str = Field(description="Name of the recipe: its file's stem.")


class FineTuning(dg.Component, dg.Model, dg.Resolvable):
    """LLaMA-Factory recipes as assets; a new file matching `recipes` becomes a new line of the graph.

    Makes `<recipe>/vision_features`, `/checkpoint`, `/predictions`, `/eval_metrics` and `/released_model`.
    """

    recipes: str = Field(default="configs/*.yaml", description="Recipe files, below the project's root.")
    defaults: Settings = Field(default=Settings(), description="Settings of every recipe.")
    settings: list[RecipeOverride] = Field(default=[], description="Settings of single recipes.")
    weekly_retraining: Retraining = Retraining()
    watch_releases: ReleaseWatch = ReleaseWatch()
    freshness: Freshness = Freshness()

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        if refused := refused_for_secret(self, context, dg.AssetKey(["recipes"]), "train"):
            return refused
        layout = Layout.from_environment()
        recipes, assets = read_recipes(context.project_root, self.recipes)
        made = _made_entries(context)
        by_hand = hand_written_entries(layout.dataset_info, made)
        around = Surroundings(
            entries={**by_hand, **made},
            models={model.directory: model.key for model in _models(context)},
            recipes={recipe.spec.output_dir: dg.AssetKey([recipe.name, "checkpoint"]) for recipe in recipes},
        )
        settings = {slug(override.recipe): override for override in self.settings}
        nodes: list[Node] = []
        for recipe in recipes:
            try:
                nodes.append(resolve(recipe, around))
            except MllmAssetsError as error:
                assets.append(failing_asset(dg.AssetKey([recipe.name, "checkpoint"]), "train", error))
        nodes, circular = split_circles(nodes)
        for node, error in circular:
            assets.append(failing_asset(node.key("checkpoint"), "train", error))
        for node in nodes:
            built = build_recipe_assets(node, settings.get(node.name, self.defaults).to_domain())
            tagged = (
                asset.map_asset_specs(lambda spec, node=node: spec.merge_attributes(tags=node.tags)) for asset in built
            )
            assets.extend(self._with_freshness(asset) for asset in tagged)
        used = {key for node in nodes for key in node.data}
        by_hand_assets = [hand_written_asset(entry, key) for entry, key in by_hand.items() if key in used]
        lines, retraining = lines_of(nodes), self.weekly_retraining
        job = retraining_job(lines, retraining.max_runtime_h)
        return dg.Definitions(
            assets=[*assets, *by_hand_assets],
            schedules=[weekly_retraining(lines, job, retraining.cron_schedule, retraining.enabled)],
            sensors=[
                released_model_regression(lines, job.name, layout, self.watch_releases.to_domain()),
                failure_alert([node.name for node in nodes]),
            ],
        )

    def _with_freshness(self, asset: dg.AssetsDefinition) -> dg.AssetsDefinition:
        policy = self.freshness.policy_of(asset.key)
        return asset.map_asset_specs(lambda spec: spec.replace_attributes(freshness_policy=policy)) if policy else asset


def _made_entries(context: dg.ComponentLoadContext) -> dict[str, dg.AssetKey]:
    """Every entry that a dataset component writes -> the asset that writes it."""
    datasets = context.component_tree.get_all_components(of_type=ImageTextDataset)
    return {
        entry: dg.AssetKey([slug(dataset.name), "dataset_info"])
        for dataset in datasets
        for entry in dataset.entry_names()
    }


def _models(context: dg.ComponentLoadContext) -> list[Model]:
    return [m for c in context.component_tree.get_all_components(of_type=PretrainedModels) for m in c.models]
