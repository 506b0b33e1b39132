"""Recipes in the graph: settings, and edges from their own keys: data by entry name, models by directory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import dagster as dg

from mllm_assets.artifacts import UNNAMED, digest_json, slug
from mllm_assets.components.reporting import MAX_TAG_LENGTH, failing_asset
from mllm_assets.components.yaml_model import YamlModel, yaml_of
from mllm_assets.data.sharegpt.entries import read_dataset_info
from mllm_assets.errors import DataError, MllmAssetsError, RecipeError, did_you_mean
from mllm_assets.evaluation.forgetting import PLAIN_QUESTIONS, require_not_trained_on
from mllm_assets.evaluation.gates import GateSpec
from mllm_assets.families.turn_format import AUTO
from mllm_assets.recipe.load import Recipe, load_recipe
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.releases.copies import GgufSpec, QuantizedSpec
from mllm_assets.releases.hub_push import PushSpec
from mllm_assets.releases.registry import RegistrySpec
from mllm_assets.training.runs.sweep_spec import SweepSpec
from mllm_assets.worker.benchmark_task import BenchmarkSettings
from mllm_assets.worker.run_settings import AnswerSample, RunSettings
from mllm_assets.worker.tasks import DEFAULT_MAX_HIDDEN_STATES_GIB, EvaluationSettings

PREFERENCES = "preferences"


class Evaluation(yaml_of(EvaluationSettings)):
    """How predictions are made."""


class Gates(yaml_of(GateSpec)):
    """Thresholds for a release, compared with the lower ends of 95 % intervals. Null keeps the default."""

    @property
    def needs_approval(self) -> bool:
        """Whether a release waits for a person."""
        return getattr(self, "approval", None) == "required"

    def spec_for(self, recipe: TrainSpec) -> GateSpec:
        """The thresholds, and what judges a recipe of its stage where nothing is set."""
        spec, by_answers = self.to_spec(), not recipe.copies_answers or recipe.changes_vocabulary
        is_set = "beats_base_by" in self.model_fields_set and getattr(self, "beats_base_by", None) is not None
        return replace(spec, beats_base_by="answers") if by_answers and not is_set else spec


class Benchmarks(yaml_of(BenchmarkSettings)):
    """Benchmarks of lmms-eval that the base and the tuned model are asked."""


class Sweep(yaml_of(SweepSpec)):
    """Trials of a recipe with other values, of which the best on `eval_dataset` is chosen."""


class PushToHub(yaml_of(PushSpec)):
    """Where the release goes on the Hugging Face Hub. HF_TOKEN of the environment is the only credential."""


class MlflowRegistry(yaml_of(RegistrySpec)):
    """The release as a version of a registered model of MLflow, at MLFLOW_TRACKING_URI."""


class Quantized(yaml_of(QuantizedSpec)):
    """The release with 8-bit weights, and how alike it must answer."""


class Gguf(yaml_of(GgufSpec)):
    """The release for llama.cpp, and how alike it must answer there."""


class Settings(YamlModel):
    """Settings of one recipe that LLaMA-Factory has no key for.

    Attributes:
        feature_cache: Cache the output of the frozen parts, the vision tower first, and train from it.
        max_hidden_states_gib: Most disk that one recipe's hidden states may take; above it they are computed in every
            step.
        allow_leakage: Only warn, and still train and release, where an evaluation entry holds pictures that were
            trained on: from another dataset, an earlier stage, or a given split (strategy guide, val_split). The model
            card says so.
        regroup_micro_batches: Regroup batch size x accumulation into the largest micro-batch that fits. The loss is a
            mean of micro-batch means, so it changes a little from LLaMA-Factory's.
        metric_samples: Rows of eval_dataset, spread evenly over it, that the model is asked about at each evaluation
            while it trains, where metric_for_best_model or a sweep's objective is a metric of answers.
        evaluation: How predictions are made.
        gates: Thresholds for a release.
        push_to_hub: Makes <recipe>/hub_model, which pushes the current release.
        mlflow_registry: Makes <recipe>/mlflow_model, a version of a registered model for each release; {} takes the
            defaults.
        quantized: Makes <recipe>/quantized, the current release with 8-bit weights, compared with it; {} takes the
            defaults.
        gguf: Makes <recipe>/gguf, the current release for llama.cpp, by its own converter; {} takes the checkout that
            LLAMA_CPP names.
        preferences: Makes <recipe>/preferences, the entry <recipe>_preferences for a recipe of stage: dpo: pairs of the
            references and the model's own wrong answers to what it was trained on.
        sweep: Makes <recipe>/sweep, which trains the recipe with other values and chooses the best.
        what_it_gained: Makes <recipe>/what_it_gained, which trains the recipe once more without people's corrections
            and compares both models on the same samples.
        benchmarks: Makes <recipe>/benchmarks, which asks the base and the tuned model what lmms-eval's benchmarks ask.
    """

    feature_cache: bool = True
    max_hidden_states_gib: float = DEFAULT_MAX_HIDDEN_STATES_GIB
    allow_leakage: bool = False
    regroup_micro_batches: bool = False
    metric_samples: int = AnswerSample().max_samples
    evaluation: Evaluation = Evaluation()
    gates: Gates = Gates()
    push_to_hub: PushToHub | None = None
    preferences: bool = False
    mlflow_registry: MlflowRegistry | None = None
    quantized: Quantized | None = None
    gguf: Gguf | None = None
    sweep: Sweep | None = None
    what_it_gained: bool = False
    benchmarks: Benchmarks | None = None

    @property
    def unrelated(self) -> tuple[str, ...]:
        """The entries on which it is measured what a model forgot."""
        return tuple(getattr(self.evaluation, "unrelated", None) or ())

    @property
    def for_runs(self) -> RunSettings:
        """What a training run is told of them."""
        evaluation = self.evaluation.to_spec()
        answers = AnswerSample(max_samples=self.metric_samples, max_new_tokens=evaluation.max_new_tokens)
        return RunSettings(regroup=self.regroup_micro_batches, answers=answers)

    def require_valid(self) -> None:
        """Refuse a value that the types let pass.

        Raises:
            RecipeError: Says which.
        """
        if self.metric_samples < 1:
            raise RecipeError(f"metric_samples is {self.metric_samples}: expected 1 or more. Change it.")
        others = (self.push_to_hub, self.mlflow_registry, self.quantized, self.gguf, self.sweep, self.benchmarks)
        for part in (self.evaluation, self.gates, *others):
            if part is not None:
                part.to_spec()


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One recipe with its settings and the assets that it reads."""

    recipe: Recipe
    settings: Settings = field(default_factory=Settings)
    model: dg.AssetKey
    train_data: Mapping[str, dg.AssetKey]  # entry of dataset_info.json -> the asset that writes it
    eval_data: Mapping[str, dg.AssetKey]
    unrelated_data: Mapping[str, dg.AssetKey] = field(default_factory=dict)  # what forgetting is measured on
    adapters: Sequence[dg.AssetKey] = ()  # checkpoints of the recipes that trained those on the model
    ancestor_data: Sequence[dg.AssetKey] = ()  # of the stages before it; not edges, since `model` depends on them

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def has_features(self) -> bool:
        """Whether an asset computes the output of the frozen vision tower."""
        spec = self.recipe.spec
        return self.settings.feature_cache and spec.freeze_vision_tower and spec.template != AUTO

    @property
    def gates(self) -> GateSpec:
        """What a model of it must show before it is released."""
        return self.settings.gates.spec_for(self.recipe.spec)

    @property
    def judged_by_benchmarks(self) -> list[dg.AssetKey]:
        """The asset of its benchmarks, where a gate looks at them."""
        asked = self.settings.benchmarks is not None and self.gates.max_benchmark_loss is not None
        return [self.key("benchmarks")] if asked else []

    def key(self, asset: str) -> dg.AssetKey:
        return dg.AssetKey([self.name, asset])

    @property
    def last(self) -> dg.AssetKey:
        """The end of its line: a release, where it goes, or without `eval_dataset` the checkpoint."""
        released = "mlflow_model" if self.settings.mlflow_registry is not None else "released_model"
        return self.key(released if self.eval_data else "checkpoint")

    @property
    def starts(self) -> list[str]:
        """The first parts of the keys of what it starts from: recipes, or models."""
        return [key.path[0] for key in (self.model, *self.adapters, *self.mistakes)]

    @property
    def mistakes(self) -> list[dg.AssetKey]:
        """What it learns of other recipes' wrong answers."""
        return [key for key in self.data if key.path[-1] == PREFERENCES]

    @property
    def tags(self) -> dict[str, str]:
        """Tags that filter the graph and the catalog: `tag:recipe=emoji_sft`."""
        return {"recipe": self.name[:MAX_TAG_LENGTH], "finetuning_type": self.recipe.spec.finetuning_type}

    @property
    def data(self) -> list[dg.AssetKey]:
        """Assets of the training and the evaluation entries, each once."""
        return sorted({*self.train_data.values(), *self.eval_data.values()})


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownAssets:
    """What recipes can refer to.

    Attributes:
        entries: Entry of `dataset_info.json` -> the asset that writes it.
        models: `pretrains/<name>` -> its asset.
        recipes: `output_dir` of a recipe -> that recipe's checkpoint.
    """

    entries: Mapping[str, dg.AssetKey]
    models: Mapping[str, dg.AssetKey]
    recipes: Mapping[str, dg.AssetKey]


def resolve(recipe: Recipe, known_assets: KnownAssets, settings: Settings | None = None) -> Node:
    """Find the assets that a recipe reads.

    Raises:
        RecipeError: Nothing makes an entry or a model; names the nearest ones. Or a setting is not valid.
    """
    settings, entries = settings or Settings(), known_assets.entries
    settings.require_valid()
    require_not_trained_on(settings.unrelated, recipe.spec.train_entries)
    shipped = dg.AssetKey([PLAIN_QUESTIONS])  # no asset: it comes with the package
    unrelated = _entry_keys(recipe, "evaluation.unrelated", settings.unrelated, {PLAIN_QUESTIONS: shipped, **entries})
    return Node(
        recipe=recipe,
        settings=settings,
        model=_model_key(recipe, known_assets),
        train_data=_entry_keys(recipe, "dataset", recipe.spec.train_entries, entries),
        eval_data=_entry_keys(recipe, "eval_dataset", recipe.spec.eval_entries, entries),
        unrelated_data={name: key for name, key in unrelated.items() if key != shipped},
        adapters=_adapter_keys(recipe, known_assets),
    )


def split_cycles(nodes: Sequence[Node]) -> tuple[list[Node], list[tuple[Node, RecipeError]]]:
    """Separate the recipes that lead back to themselves from the others, which get their `ancestor_data`."""
    by_name = {node.name: node for node in nodes}
    sound: list[Node] = []
    circular: list[tuple[Node, RecipeError]] = []
    for node in nodes:
        way = _way_back(node, by_name)
        if way is None:
            sound.append(node)
            continue
        cycle = " <- ".join([*way, node.name])
        key = "dataset" if node.mistakes else "adapter_name_or_path" if node.adapters else "model_name_or_path"
        text = (
            f"{node.recipe.path.name}: {key} leads back to the recipe itself ({cycle}). "
            "Let one of them start from a model below pretrains/."
        )
        circular.append((node, RecipeError(text)))
    by_name = {node.name: node for node in sound}

    def ancestor_data(node: Node) -> set[dg.AssetKey]:
        bases = [by_name[start] for start in node.starts if start in by_name]
        return {key for base in bases for key in (*base.train_data.values(), *ancestor_data(base))}

    return [replace(node, ancestor_data=sorted(ancestor_data(node) - set(node.data))) for node in sound], circular


def _way_back(node: Node, by_name: Mapping[str, Node]) -> list[str] | None:
    """The recipes over which one leads back to itself."""

    def from_last(way: list[str]) -> list[str] | None:
        for start in by_name[way[-1]].starts:
            if start == node.name:
                return way
            if start in by_name and start not in way and (found := from_last([*way, start])):
                return found
        return None

    return from_last([node.name])


def chains_of(nodes: Sequence[Node]) -> dict[str, list[str]]:
    """First recipe of a chain -> the recipes that start from it or from one another, itself included."""
    parent = {node.name: node.model.path[0] for node in nodes}
    chains: dict[str, list[str]] = {}
    for name in parent:
        first = name
        while parent[first] in parent:
            first = parent[first]
        chains.setdefault(first, []).append(name)
    return chains


def external_entries(dataset_info: Path, made: Iterable[str]) -> dict[str, dg.AssetKey]:
    """Entries that a user wrote into `dataset_info.json`: each is an external asset, `<entry>/dataset_info`."""
    try:
        entries = read_dataset_info(dataset_info.parent)
    except DataError:  # a broken file is reported, with its line, by whatever reads its rows
        return {}
    return {
        name: dg.AssetKey([slug(name, f"entry_{digest_json(name)[:8]}"), "dataset_info"])
        for name in entries
        if name not in set(made)
    }


def _entry_keys(
    recipe: Recipe, key: str, names: Iterable[str], entries: Mapping[str, dg.AssetKey]
) -> dict[str, dg.AssetKey]:
    for name in names:
        if name not in entries:
            raise RecipeError(
                f"{recipe.path.name}: {key} names {name!r}, which no dataset writes. {did_you_mean(name, entries)}"
                f"Known entries: {', '.join(sorted(entries))}. Correct the recipe, or add the dataset below "
                "defs/datasets/."
            )
    return {name: entries[name] for name in names}


def _model_key(recipe: Recipe, known_assets: KnownAssets) -> dg.AssetKey:
    path = PurePosixPath(recipe.spec.model_name_or_path)
    if (known := known_assets.models.get(str(path))) is not None:
        return known
    for output_dir, checkpoint in known_assets.recipes.items():
        if path.is_relative_to(output_dir):
            if checkpoint.path[0] == recipe.name:
                raise RecipeError(
                    f"{recipe.path.name}: model_name_or_path {str(path)!r} is the recipe's own output. "
                    "Name the model that it starts from, for example pretrains/gemma3-4b-it."
                )
            return checkpoint
    raise RecipeError(
        f"{recipe.path.name}: model_name_or_path is {str(path)!r}, which no asset makes. Known models: "
        f"{', '.join(sorted(known_assets.models))}; outputs of recipes: {', '.join(sorted(known_assets.recipes))}. "
        "Correct the recipe, or declare the model in defs/pretrained/defs.yaml (kind: local for one of your own)."
    )


def _adapter_keys(recipe: Recipe, known_assets: KnownAssets) -> list[dg.AssetKey]:
    """The checkpoints whose adapters a recipe starts from; a folder that no recipe writes has no asset."""
    found = []
    for name in recipe.spec.adapters:
        for output_dir, checkpoint in known_assets.recipes.items():
            if not PurePosixPath(name).is_relative_to(output_dir):
                continue
            if checkpoint.path[0] == recipe.name:
                raise RecipeError(
                    f"{recipe.path.name}: adapter_name_or_path {name!r} is the recipe's own output. Name the adapter "
                    "that it starts from; an unfinished run resumes by itself."
                )
            found.append(checkpoint)
    return list(dict.fromkeys(found))


def read_recipes(project_root: Path, pattern: str) -> tuple[list[Recipe], list[dg.AssetsDefinition]]:
    """Read the recipe files; each that cannot be read becomes an asset that fails with the message."""
    by_name: dict[str, list[Path]] = {}
    for path in sorted(project_root.glob(pattern)):
        by_name.setdefault(slug(path.stem, UNNAMED), []).append(path)
    recipes: list[Recipe] = []
    errors: dict[str, MllmAssetsError] = {}
    for name, paths in by_name.items():
        if len(paths) > 1:
            files = " and ".join(path.name for path in paths)
            errors[name] = RecipeError(f"{files} would both be the recipe {name!r}. Rename one.")
            continue
        try:
            recipes.append(load_recipe(paths[0]))
        except MllmAssetsError as error:
            errors[name] = error
    errors |= _shared_output_dirs(recipes)
    unreadable = [failing_asset(dg.AssetKey([name, "checkpoint"]), error) for name, error in errors.items()]
    return [recipe for recipe in recipes if recipe.name not in errors], unreadable


def _shared_output_dirs(recipes: list[Recipe]) -> dict[str, MllmAssetsError]:
    """Name -> error of each recipe whose `output_dir` is another's too; the recipe of the directory's name keeps it."""
    sharing: dict[PurePosixPath, list[Recipe]] = {}
    for recipe in recipes:
        sharing.setdefault(PurePosixPath(recipe.spec.output_dir), []).append(recipe)
    return {
        recipe.name: RecipeError(
            f"{recipe.path.name}: output_dir {recipe.spec.output_dir!r} is also that of "
            f"{' and '.join(other.path.name for other in group if other is not recipe)}. "
            f"Give it its own, for example outputs/{recipe.name}."
        )
        for output_dir, group in sharing.items()
        if len(group) > 1
        for recipe in group
        if recipe.name != slug(output_dir.name, UNNAMED)
    }
