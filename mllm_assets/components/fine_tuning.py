"""Every recipe in `configs/` as assets: features, checkpoint, predictions, metrics, release."""

from collections.abc import Collection, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path, PurePosixPath

import dagster as dg
from pydantic import Field

from mllm_assets.artifacts import UNNAMED, slug
from mllm_assets.components.assets.label_issues import label_issues_assets
from mllm_assets.components.assets.recipe import build_recipe_assets, external_asset
from mllm_assets.components.automation.approvals import approval_sensors
from mllm_assets.components.automation.failures import failure_alert
from mllm_assets.components.automation.registry import registry_automation
from mllm_assets.components.automation.releases import ReleaseWatch, released_model_regression
from mllm_assets.components.automation.retraining import retraining_job, weekly_retraining
from mllm_assets.components.image_text_dataset import ImageTextDataset
from mllm_assets.components.jobs import LOGGERS, line_job
from mllm_assets.components.pretrained_model import PretrainedModels
from mllm_assets.components.reporting import failing_asset, in_line
from mllm_assets.components.switches import SwitchesOn, off_asset, off_text
from mllm_assets.components.wiring import (
    PREFERENCES,
    KnownAssets,
    Node,
    Settings,
    chains_of,
    external_entries,
    read_recipes,
    resolve,
    split_cycles,
)
from mllm_assets.components.yaml_checks import refuse_secrets
from mllm_assets.components.yaml_model import YamlModel
from mllm_assets.errors import MllmAssetsError, RecipeError, did_you_mean
from mllm_assets.evaluation.own_mistakes import preferences_entry
from mllm_assets.layout import Layout
from mllm_assets.recipe.load import Recipe


class Retraining(YamlModel):
    """The schedule that retrains what changed.

    Attributes:
        enabled: Whether it runs without being switched on in the UI.
        cron_schedule: When; by default at 3 on Mondays, UTC.
        max_runtime_h: Hours after which a run is ended and counts as failed; null for no limit.
    """

    enabled: bool = False
    cron_schedule: str = "0 3 * * 1"
    max_runtime_h: float | None = Field(default=24.0, gt=0)


class Freshness(YamlModel):
    """How old results may get before the UI says so; null for any age. Nothing is launched.

    Attributes:
        checkpoint_max_age_days: Of `<recipe>/checkpoint`.
        metrics_max_age_days: Of `<recipe>/eval_metrics`.
    """

    checkpoint_max_age_days: float | None = Field(default=None, gt=0)
    metrics_max_age_days: float | None = Field(default=None, gt=0)

    def policy_of(self, key: dg.AssetKey) -> dg.FreshnessPolicy | None:
        """The policy of an asset; it warns at three quarters of the age."""
        days = {"checkpoint": self.checkpoint_max_age_days, "eval_metrics": self.metrics_max_age_days}.get(key.path[-1])
        if days is None:
            return None
        return dg.FreshnessPolicy.time_window(timedelta(days=days), warn_window=timedelta(days=days * 0.75))


class RecipeOverride(Settings):
    """Settings of one recipe, instead of the defaults.

    Attributes:
        recipe: Name of the recipe: its file's stem.
    """

    recipe: str


class FineTuning(dg.Component, YamlModel, SwitchesOn):
    """LLaMA-Factory recipes as assets; a new file matching `recipes` becomes a new branch of the graph.

    Makes `<recipe>/vision_features`, `/checkpoint`, `/predictions`, `/eval_metrics` and `/released_model`.

    Attributes:
        recipes: Recipe files, below the project's root.
        enabled: Recipes that are switched on with their model and data, where those are not (`enabled: false`).
        defaults: Settings of every recipe.
        settings: Settings of individual recipes.
        weekly_retraining: The schedule that retrains what changed.
        watch_releases: The sensor that checks whether released models got worse.
        freshness: How old results may get before the UI says so.
    """

    recipes: str = "configs/*.yaml"
    enabled: list[str] = []
    defaults: Settings = Settings()
    settings: list[RecipeOverride] = []
    weekly_retraining: Retraining = Retraining()
    watch_releases: ReleaseWatch = ReleaseWatch()
    freshness: Freshness = Freshness()

    def switched_on(self, root: Path) -> set[str]:
        recipes = self._enabled_recipes(read_recipes(root, self.recipes)[0]) if self.enabled else []
        settings = self._settings()
        found: set[str] = set()
        for recipe in recipes:
            spec, unrelated = recipe.spec, settings.get(recipe.name, self.defaults).unrelated
            found.update((*spec.train_entries, *spec.eval_entries, *unrelated, spec.model_name_or_path))
        return found

    def _settings(self) -> dict[str, Settings]:
        """The settings of single recipes."""
        return {slug(override.recipe, UNNAMED): override for override in self.settings}

    def _enabled_recipes(self, recipes: Sequence[Recipe]) -> list[Recipe]:
        """Those that are named, and those that they start from."""
        on = [recipe for recipe in recipes if recipe.name in [slug(name, UNNAMED) for name in self.enabled]]
        for recipe in on:  # grows meanwhile
            model = PurePosixPath(recipe.spec.model_name_or_path)
            on += [base for base in recipes if base not in on and model.is_relative_to(base.spec.output_dir)]
        return on

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        if refused := refuse_secrets(self, context, dg.AssetKey(["recipes"])):
            return refused
        layout = Layout.from_environment()
        recipes, assets = read_recipes(context.project_root, self.recipes)
        tree = context.component_tree
        made = {
            entry: dg.AssetKey([slug(dataset.name, UNNAMED), "dataset_info"])
            for dataset in tree.get_all_components(of_type=ImageTextDataset)
            for entry in dataset.entry_names()
        }
        settings = self._settings()
        made |= {
            preferences_entry(recipe.name): dg.AssetKey([recipe.name, PREFERENCES])
            for recipe in recipes
            if settings.get(recipe.name, self.defaults).preferences
        }
        external = external_entries(layout.dataset_info, made)
        known_assets = KnownAssets(
            entries={**external, **made},
            models={m.directory: m.key for c in tree.get_all_components(of_type=PretrainedModels) for m in c.models},
            recipes={recipe.spec.output_dir: dg.AssetKey([recipe.name, "checkpoint"]) for recipe in recipes},
        )
        nodes: list[Node] = []
        for recipe in recipes:
            try:
                nodes.append(resolve(recipe, known_assets, settings.get(recipe.name, self.defaults)))
            except MllmAssetsError as error:
                assets.append(failing_asset(dg.AssetKey([recipe.name, "checkpoint"]), error))
        nodes, circular = split_cycles(nodes)
        for node, error in circular:
            assets.append(failing_asset(node.key("checkpoint"), error))
        known = {key.path[0] for asset in assets for key in asset.keys} | {node.name for node in nodes}
        assets += self._unknown_recipes(known)
        off = self._switched_off(nodes, _declared_off(tree))
        assets += [asset for node in nodes for asset in self._built(node, off.get(node.name))]
        assets += label_issues_assets(_wanted_issues(tree), nodes, off)
        used = {key for node in nodes for key in (*node.data, *node.unrelated_data.values())}
        media_dirs = {key: found for node in nodes for key in node.data if (found := node.recipe.spec.media_dir)}
        external_assets = [
            external_asset(entry, key, media_dirs.get(key)) for entry, key in external.items() if key in used
        ]
        datasets = {slug(dataset.name, UNNAMED) for dataset in tree.get_all_components(of_type=ImageTextDataset)}
        jobs = [line_job(node.last, _line_of(node), datasets) for node in nodes]
        on = [node for node in nodes if node.name not in off]
        chains, retraining = chains_of(on), self.weekly_retraining
        job = retraining_job(chains, retraining.max_runtime_h)
        own = dg.Definitions(
            assets=[*assets, *external_assets],
            jobs=jobs,
            loggers=LOGGERS,
            schedules=[weekly_retraining(chains, job, retraining.cron_schedule, retraining.enabled)],
            sensors=[
                released_model_regression(chains, job.name, layout, self.watch_releases),
                failure_alert([node.name for node in nodes]),
                *approval_sensors(on, layout),
            ],
        )
        return dg.Definitions.merge(own, registry_automation(on, layout))

    def _built(self, node: Node, why_off: str | None) -> list[dg.AssetsDefinition]:
        """A recipe's assets."""
        tagged = partial(self._with_tags_and_freshness, node)
        built = [asset.map_asset_specs(tagged) for asset in build_recipe_assets(node)]
        return [off_asset(asset, why_off) for asset in built] if why_off else built

    def _unknown_recipes(self, known: Collection[str]) -> list[dg.AssetsDefinition]:
        """An asset that fails for each name in `enabled` that no recipe has."""
        return [
            failing_asset(
                dg.AssetKey([slug(name, UNNAMED), "checkpoint"]),
                RecipeError(f"enabled names {name!r}, which no recipe is called. {did_you_mean(name, known)}"),
            )
            for name in self.enabled
            if slug(name, UNNAMED) not in known
        ]

    def _switched_off(self, nodes: Sequence[Node], off: Collection[dg.AssetKey]) -> dict[str, str]:
        """Each recipe that needs what is off, and is not switched on itself, with the sentence that says so."""
        on = {recipe.name for recipe in self._enabled_recipes([node.recipe for node in nodes])}
        found: dict[str, str] = {}
        for _ in nodes:  # a recipe may start from one that comes later
            for node in nodes:
                read = (*node.data, *node.unrelated_data.values(), node.model)
                needs = [key for key in read if key in off or key.path[0] in found]
                if needs and node.name not in on:
                    names = " and ".join(sorted(_owner_name(key) for key in needs))
                    found[node.name] = off_text(node.name, f"needs {names}, which this project does not use yet")
        return found

    def _with_tags_and_freshness(self, node: Node, spec: dg.AssetSpec) -> dg.AssetSpec:
        tagged = in_line(spec.merge_attributes(tags=node.tags), node.name)
        return tagged.replace_attributes(freshness_policy=self.freshness.policy_of(spec.key))


def _declared_off(tree: dg.ComponentTree) -> set[dg.AssetKey]:
    """Entries of datasets and models with `enabled: false`."""
    models = [m for c in tree.get_all_components(of_type=PretrainedModels) for m in c.models if not m.enabled]
    datasets = [d for d in tree.get_all_components(of_type=ImageTextDataset) if not d.enabled]
    keys = {dg.AssetKey([slug(dataset.name, UNNAMED), "dataset_info"]) for dataset in datasets}
    return keys | {model.key for model in models}


def _wanted_issues(tree: dg.ComponentTree) -> dict[str, YamlModel]:
    """Of each dataset that wants its training rows ranked, how."""
    datasets = tree.get_all_components(of_type=ImageTextDataset)
    return {slug(one.name, UNNAMED): one.label_issues for one in datasets if one.label_issues is not None}


def _owner_name(key: dg.AssetKey) -> str:
    return key.path[1] if key.path[0] == "pretrained" else key.path[0]


def _line_of(node: Node) -> str:
    last = "a released model" if node.eval_data else "a checkpoint"
    return f"{node.recipe.path.name}: everything from its data and model to {last}."
