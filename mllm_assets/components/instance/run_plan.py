"""What `mllm-assets run` makes: the assets that are named, and those that they need and that are out of date."""

import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

from mllm_assets.artifacts import MANIFEST
from mllm_assets.components.assets.checkpoint import RECIPE_FILE
from mllm_assets.components.assets.corrections import DECISIONS
from mllm_assets.components.automation.retraining import find_outdated
from mllm_assets.components.automation.sources import LISTING, SOURCE
from mllm_assets.components.facts import facts_of
from mllm_assets.components.instance.location import Location
from mllm_assets.components.reporting import OFF, UNREADABLE
from mllm_assets.components.slots import run_tags
from mllm_assets.data.curate.corrections import corrections_digest
from mllm_assets.data.ingest.paths import list_source
from mllm_assets.data.ingest.spec import SourceSpec
from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import MllmAssetsError, RecipeError, all_of
from mllm_assets.evaluation.run_lookup import find_run
from mllm_assets.layout import Layout
from mllm_assets.recipe.load import Recipe, load_recipe
from mllm_assets.store.errors import SETTING
from mllm_assets.training.runs.plan import overridden, require_overridable, shown_overrides

NAMED = "named"
FORCED = "forced: made again"
RELEASED = ("released_model", "mlflow_model")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A command line.

    Attributes:
        names: Of recipes, datasets, models or assets.
        overrides: `key=value`, for the checkpoints of the recipes that are named.
        only: Nothing but what is named; of a recipe or a dataset its own assets, without what they are made from.
        force: Everything again: no finished run and nothing up to date is taken as it is.
    """

    names: Sequence[str]
    overrides: Sequence[str] = ()
    only: bool = False
    force: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What will run and why, in order; what is up to date; and what a failed gate or check holds back, with it.

    `notes` say which values of the command line have no effect.
    """

    named: Sequence[dg.AssetKey]
    reasons: Mapping[dg.AssetKey, str]
    current: Sequence[dg.AssetKey]
    blocked: Mapping[dg.AssetKey, str]
    notes: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> Iterator[str]:
        """Lines for a terminal."""
        yield from (f"  note  {note}" for note in self.notes)
        width = max((len(key.to_user_string()) for key in [*self.reasons, *self.blocked]), default=0)
        for mark, found in (("run ", self.reasons), ("hold", self.blocked)):
            for key, why in found.items():
                yield f"  {mark}  {key.to_user_string():<{width}}  {why}"
        if self.current:
            yield f"  up to date: {', '.join(key.to_user_string() for key in self.current)}"


def plan_run(request: Request, location: Location, instance: dg.DagsterInstance, layout: Layout) -> RunPlan:
    """Decide what a command line makes.

    Raises:
        RecipeError: A name is unknown, switched off or cannot be built, or a value does not fit its recipe. Nothing
            was run.
    """
    graph = location.repository.asset_graph
    found = {location.plain(name): location.find(name) for name in request.names}
    assets = {name: keys for name, keys in found.items() if name not in location.owners}
    explicit = {key for name, keys in assets.items() if "*" not in name for key in keys}
    named = list(dict.fromkeys(key for keys in found.values() for key in keys))
    recipes = _overridden_recipes(request, location, {key.path[0] for key in named}, layout)
    trials = {name: values for name, recipe in recipes.items() if (values := overridden(recipe))}
    named = [_end_of_trial(key) if key.path[0] in trials and key not in explicit else key for key in named]
    wanted = dg.AssetSelection.assets(*named).upstream().resolve(graph) & graph.materializable_asset_keys
    own = {key for key in wanted if key.path[0] in found} | {key for keys in assets.values() for key in keys}
    keys = _together(wanted & own if request.only else wanted, graph)
    _require_ready(location, keys, {key.path[0] for key in named})
    config = _config(request, recipes, keys, {key.path[0] for key in named})
    forced = _changed(location, instance, layout, keys, trials)
    if request.force:
        forced |= dict.fromkeys(keys, FORCED)
    forced |= {other: forced.get(other, NAMED) for other in _together(explicit, graph)}
    outdated = find_outdated(location.repository, instance, keys, forced=forced)
    partners = _together(set(outdated.reasons), graph) - set(outdated.reasons)
    reasons = _with_values(outdated.reasons, trials) | dict.fromkeys(partners, "made with the others")
    order = [key for key in graph.toposorted_asset_keys if key in keys]
    blocked = {key: outdated.blocked[key] for key in order if key in outdated.blocked and key not in reasons}
    changed = {key: value for values in trials.values() for key, value in values.items()}
    return RunPlan(
        named=named,
        reasons={key: reasons[key] for key in order if key in reasons},
        current=[key for key in order if key not in reasons and key not in blocked],
        blocked=blocked,
        notes=[note for name, recipe in recipes.items() for note in _notes(recipe, request, trials.get(name, {}))],
        config=config,
        tags=run_tags(" ".join(dict.fromkeys(key.path[0] for key in named)), changed),
    )


def _with_values(reasons: Mapping[dg.AssetKey, str], trials: Mapping[str, Mapping[str, Any]]) -> dict[dg.AssetKey, str]:
    """The reasons, those of a checkpoint with the values that it trains with instead of the file's."""
    found = dict(reasons)
    for key, why in reasons.items():
        shown = shown_overrides(trials.get(key.path[0], {})) if key.path[-1] == "checkpoint" else ""
        if shown not in why:
            found[key] = f"{why}, with {shown}"
    return found


def _together(keys: Collection[dg.AssetKey], graph: AssetGraph) -> set[dg.AssetKey]:
    """With those that the same step makes: the splits of a dataset."""
    return {other for key in keys for other in graph.get(key).execution_set_asset_keys}


def _overridden_recipes(
    request: Request, location: Location, owners: Collection[str], layout: Layout
) -> dict[str, Recipe]:
    """The named recipes, read with the values of the command line, if it has any."""
    if not request.overrides:
        return {}
    graph = location.repository.asset_graph
    files = {
        key.path[0]: str(recipe_file)
        for key in location.keys.values()
        if key.path[0] in owners and (recipe_file := facts_of(graph.get(key).metadata).get(RECIPE_FILE))
    }
    if not files:
        raise RecipeError(
            f"{' '.join(request.overrides)}: only a recipe that can be read takes values, which "
            f"{' and '.join(request.names)} is not: mllm-assets run RECIPE key=value. Nothing was run."
        )
    recipes = {name: load_recipe(Path(path), request.overrides) for name, path in files.items()}
    for recipe in recipes.values():
        require_overridable(recipe)
        _require_entries(recipe, layout)
    return recipes


def _notes(recipe: Recipe, request: Request, trial: Mapping[str, Any]) -> Iterator[str]:
    """Which values of the command line have no effect, and which none on a run that is finished."""
    written = load_recipe(recipe.path)
    notes = [note for note in recipe.notes if note not in written.notes]
    yield from notes
    if trial or notes or request.force:
        return
    given = [text.partition("=")[0].strip() for text in request.overrides]
    same = [key for key in given if getattr(written.spec, key, None) == getattr(recipe.spec, key, None)]
    other = [key for key in given if key not in same]
    texts = [f"{', '.join(same)}: as in {recipe.path.name}"] if same else []
    texts += [f"{', '.join(other)}: the weights do not depend on it"] if other else []
    yield f"{'; '.join(texts)}. A finished run is taken as it is; --force trains again."


def _require_entries(recipe: Recipe, layout: Layout) -> None:
    """Refuse entries that the command line names and that are not there: nothing before the training makes them."""
    written, spec = load_recipe(recipe.path).spec, recipe.spec
    dataset = Dataset.of_recipe(spec, layout.root)
    for name in {*spec.train_entries, *spec.eval_entries} - {*written.train_entries, *written.eval_entries}:
        dataset.entry(name)


def _end_of_trial(key: dg.AssetKey) -> dg.AssetKey:
    """A trial is judged, and released only where that is asked for by name."""
    return dg.AssetKey([key.path[0], "eval_metrics"]) if key.path[-1] in RELEASED else key


def _require_ready(location: Location, keys: Collection[dg.AssetKey], owners: Collection[str]) -> None:
    """Refuse what cannot be built or is switched off: it would end the run after other assets were made."""
    graph = location.repository.asset_graph
    texts = {key: (graph.get(key).description or "").partition("\n\n")[0] for key in sorted(keys)}
    broken = [f"{key.to_user_string()}: {text}" for key, text in texts.items() if _has(graph, key, UNREADABLE)]
    off = [text for key, text in texts.items() if _has(graph, key, OFF)]
    own = [text for text in off if text.partition(" ")[0] in owners]  # which switches on what it needs too
    if problems := [*broken, *(own or off)]:
        raise RecipeError(f"{all_of(problems)}\nNothing was run.")


def _has(graph: AssetGraph, key: dg.AssetKey, tag: str) -> bool:
    return tag in graph.get(key).tags


def _config(
    request: Request, recipes: Mapping[str, Recipe], keys: Collection[dg.AssetKey], owners: Collection[str]
) -> dict[str, Any]:
    """The run's configuration of the named recipes' checkpoints."""
    checkpoints = {key.path[0]: key for key in keys if key.path[0] in owners and key.path[-1] == "checkpoint"}
    if left_out := sorted(set(recipes) - set(checkpoints)):
        raise RecipeError(
            f"{' '.join(request.overrides)}: {left_out[0]}/checkpoint, which takes the values, is not made by this "
            "command. Leave --only out, or name it too. Nothing was run."
        )
    names = [text.partition("=")[0].strip() for text in request.overrides]
    ops: dict[str, Any] = {}
    for owner, key in checkpoints.items():
        values: dict[str, Any] = {"force": True} if request.force else {}
        if owner in recipes:
            values["other"] = {name: recipes[owner].values[name] for name in names}
        if values:
            ops[key.to_python_identifier()] = {"config": values}
    return {"ops": ops} if ops else {}


def _changed(
    location: Location,
    instance: dg.DagsterInstance,
    layout: Layout,
    keys: Collection[dg.AssetKey],
    trials: Mapping[str, Mapping[str, Any]],
) -> dict[dg.AssetKey, str]:
    """What Dagster's history does not know: files that are gone, a source that changed, a run with other values."""
    graph, found = location.repository.asset_graph, {}
    is_mirrored = bool(os.environ.get(SETTING))  # what is missing here is pulled
    for key in keys:
        event = instance.get_latest_materialization_event(key)
        if event is None or event.asset_materialization is None:
            continue
        known = facts_of(event.asset_materialization.metadata)
        path = known.get("path", known.get("model_path"))
        if isinstance(path, str) and not is_mirrored and _is_gone(layout.root / path):
            found[key] = f"{path} is gone"
        source = graph.get(key).metadata.get(SOURCE)
        if LISTING in known and source is not None and (new := _new_listing(source.value, layout, known[LISTING])):
            found[key] = new
        if DECISIONS in known and known[DECISIONS] != corrections_digest(layout, key.path[0]):
            found[key] = "people decided about its samples"
        if key.path[-1] == "checkpoint" and "fingerprint" in known:
            made, asked = dict(known.get("overrides") or {}), trials.get(key.path[0], {})
            if made != asked:
                found[key] = _other_values(layout, key.path[0], asked, made)
    return found


def _other_values(layout: Layout, recipe: str, asked: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    shown = shown_overrides(asked)
    text = shown or f"the last run had {shown_overrides(made)}"
    try:
        run_dir = find_run(layout, recipe, shlex.split(shown))
    except MllmAssetsError:
        return text
    return f"{text}; {layout.relative(run_dir)} is finished and taken, unless data or model changed"


def _is_gone(path: Path) -> bool:
    if path.is_file() or (path / MANIFEST).is_file() or any(path.glob(f"*/{MANIFEST}")):  # each shard of a cache
        return False
    return not (path.is_dir() and path.parent.name == "pretrains")


def _new_listing(source: Any, layout: Layout, known: Any) -> str | None:
    try:
        listing = list_source(SourceSpec(**source), layout.root)
    except MllmAssetsError:
        return "its source changed"  # reading it says how
    return None if listing.digest == known else f"the {listing.num_files} files of its source changed"
