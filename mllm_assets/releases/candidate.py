"""The evaluated model that a person decides about, with what they are shown."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mllm_assets.artifacts import read_manifest
from mllm_assets.errors import IntegrityError
from mllm_assets.evaluation.gallery import GALLERY
from mllm_assets.evaluation.intervals import gain_text
from mllm_assets.evaluation.metrics import read_metrics
from mllm_assets.evaluation.run_lookup import EvaluatedRun, evaluated_runs, evaluation_of, find_run, how_to_evaluate
from mllm_assets.evaluation.scores import in_order
from mllm_assets.layout import Layout
from mllm_assets.project.read import materialize_command, require_known_recipe
from mllm_assets.releases.approvals import Decision, Subject, read_decisions
from mllm_assets.releases.versions import list_releases
from mllm_assets.training.runs.plan import shown_overrides


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One metric on one entry, as texts."""

    entry: str
    metric: str
    base: str
    tuned: str
    gain: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Considered:
    """A model, its figures and what was decided about it.

    Attributes:
        run: Its directory relative to the root, with the values that override the recipe's.
        metrics_dir: Relative to the root.
        gallery: The page of its answers, relative to the root; empty where there is none.
        decisions: About this model by these answers, the oldest first.
        version: The release that holds it, or empty.
    """

    recipe: str
    run: str
    subject: Subject
    metrics_dir: str
    gallery: str
    figures: list[Figure]
    decisions: list[Decision]
    version: str

    def seen(self, gates: Mapping[str, str]) -> dict[str, str]:
        """What a decision remembers of what was shown."""
        shown = {f"{one.entry} {one.metric}": f"{one.base} -> {one.tuned}" for one in self.figures}
        return {"run": self.run, **shown, **{f"gate {gate}": text for gate, text in gates.items()}}


def consider(layout: Layout, name: str) -> Considered:
    """The model of a recipe that was evaluated last, or that of a run, `<recipe>/<fingerprint>`.

    Raises:
        IntegrityError: It was not evaluated. Gives the command.
        RecipeError: No recipe has this name.
    """
    recipe = name.partition("/")[0]
    require_known_recipe(layout, recipe)
    if "/" in name:
        run_dir = find_run(layout, name)
        found = evaluation_of(layout, run_dir)
        why = how_to_evaluate(layout, run_dir)
    else:
        found = next(evaluated_runs(layout, recipe), None)
        why = f"Evaluate it: {materialize_command(f'{recipe}/eval_metrics')}"
    if found is None:
        raise IntegrityError(f"{name} has no figures that anybody could decide by. {why}")
    return _considered(layout, recipe, found)


def _considered(layout: Layout, recipe: str, found: EvaluatedRun) -> Considered:
    subject = Subject.of(found.metrics_dir)
    releases = [(release.version, read_manifest(release.directory)) for release in list_releases(layout, recipe)]
    held = [version for version, manifest in releases if manifest["weights_digest"] == subject.weights_digest]
    overrides = shown_overrides(read_manifest(found.run_dir).get("overrides", {}))
    gallery = found.predictions_dir / GALLERY
    return Considered(
        recipe=recipe,
        run=f"{layout.relative(found.run_dir)} {overrides}".rstrip(),
        subject=subject,
        metrics_dir=layout.relative(found.metrics_dir),
        gallery=layout.relative(gallery) if gallery.is_file() else "",
        figures=list(_figures(found.metrics_dir)),
        decisions=[one for one in read_decisions(layout, recipe) if one.subject == subject],
        version=held[-1] if held else "",
    )


def _figures(metrics_dir: Path) -> Iterator[Figure]:
    for entry, scored in read_metrics(metrics_dir)["entries"].items():
        tuned, base = scored["models"]["tuned"], scored["models"].get("base", {})
        gains = scored["gains"].get("tuned_over_base", {})
        for metric in in_order(tuned, headlines=True):
            yield Figure(
                entry=entry,
                metric=metric,
                base=f"{base[metric]:.4g}" if metric in base else "",
                tuned=f"{tuned[metric]:.4g}",
                gain=gain_text(gains.get(metric)),
            )
