"""Any runs next to each other: their figures in one table, and what any two models answer to the same samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mllm_assets.artifacts import is_complete, path_inside, read_manifest
from mllm_assets.errors import IntegrityError, MllmAssetsError
from mllm_assets.evaluation.gallery import collect_samples
from mllm_assets.evaluation.metrics import read_metrics
from mllm_assets.evaluation.run_lookup import EvaluatedRun, evaluation_of, how_to_evaluate
from mllm_assets.evaluation.scores import METRICS, in_order
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout
from mllm_assets.training.runs.history import KnownRun, differing_keys

PAGE_SIZE = 12
ORDERS = ("as in the entry", "most different losses", "second better first", "first better first", "hardest first")
CHANGES = {
    "": "all",
    "differ": "the answers differ",
    "fixed": "only the second is right",
    "broken": "only the first is right",
    "wrong": "both are wrong",
}
Model = Literal["base", "tuned"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of the table of runs: one figure or one key of each.

    Attributes:
        group: "recipe", "training", an entry, or "gates".
        name: Of a key, a metric or a gate.
        texts: One for each run; empty where it has none.
        best: Which of them are best; empty where nothing is better than another.
    """

    group: str
    name: str
    texts: Sequence[str]
    best: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """What two models answered to one sample; `changes` are the keys of `CHANGES` that hold for it."""

    sample_id: str
    entry: str
    images: Sequence[Path]
    prompt: str
    reference: str
    answers: tuple[str, str]
    rights: tuple[bool | None, bool | None]
    losses_nats: tuple[float, float]

    @property
    def changes(self) -> set[str]:
        first, second = self.rights
        found = {""} | ({"differ"} if self.answers[0].strip() != self.answers[1].strip() else set())
        named: Mapping[Any, str] = {(False, True): "fixed", (True, False): "broken", (False, False): "wrong"}
        return found | ({named[first, second]} if (first, second) in named else set())


def table_of(layout: Layout, runs: Sequence[KnownRun], gates: Mapping[str, Mapping[str, str]]) -> list[Line]:
    """What differs between runs, and what came out.

    `gates[metrics folder][gate]` says how a gate was judged; the folder is relative to the root.
    """
    keys = ["max_steps", "learning_rate", *differing_keys(runs)] if len(runs) == 1 else differing_keys(runs)
    lines = [
        Line(
            group="recipe",
            name=key,
            texts=["" if (v := run.recipe.get(key)) is None else str(v) for run in runs],
        )
        for key in keys
    ]
    lines += _training(runs)
    evaluated = [_evaluation(layout, run) for run in runs]
    metrics = [_metrics(found) for found in evaluated]
    for entry in dict.fromkeys(entry for some in metrics for entry in some):
        of_entry = [some.get(entry, {}) for some in metrics]
        for name in in_order(dict.fromkeys(name for values in of_entry for name in values)):
            lines.append(_line(entry, name, [values.get(name) for values in of_entry], METRICS[name].higher_is_better))
    judged = [gates.get(layout.relative(found.metrics_dir), {}) if found else {} for found in evaluated]
    names = dict.fromkeys(name for some in judged for name in some)
    return lines + [Line(group="gates", name=name, texts=[some.get(name, "") for some in judged]) for name in names]


def _training(runs: Sequence[KnownRun]) -> list[Line]:
    logs = [run.log for run in runs]
    manifests = [read_manifest(run.directory) if run.state == "finished" else {} for run in runs]
    steps = [f"{log[-1]['current_steps']} of {log[-1]['total_steps']}" if log else "" for log in logs]
    lines = [
        Line(group="training", name="state", texts=[run.state for run in runs]),
        Line(group="training", name="steps", texts=steps),
    ]
    for key in ("loss", "eval_loss"):
        last = [next((line[key] for line in reversed(log) if line.get(key) is not None), None) for log in logs]
        lines.append(_line("training", f"last {key}", last, higher_is_better=False))
    lines.append(_line("training", "train_wall_s", [some.get("train_wall_s") for some in manifests], None))
    lines.append(_line("training", "samples_per_s", [some.get("samples_per_s") for some in manifests], None))
    params = [some.get("num_trainable_params") for some in manifests]
    lines.append(
        Line(group="training", name="trainable parameters", texts=["" if n is None else f"{n:,}" for n in params])
    )
    return [line for line in lines if any(line.texts)]


def _line(group: str, name: str, values: Sequence[float | None], higher_is_better: bool | None) -> Line:
    known = {index: value for index, value in enumerate(values) if value is not None}
    best: frozenset[int] = frozenset()
    if higher_is_better is not None and len(set(known.values())) > 1:
        top = (max if higher_is_better else min)(known.values())
        best = frozenset(index for index, value in known.items() if value == top)
    return Line(group=group, name=name, texts=["" if v is None else f"{v:.4g}" for v in values], best=best)


def _evaluation(layout: Layout, run: KnownRun) -> EvaluatedRun | None:
    if run.state != "finished" or not is_complete(run.directory):
        return None
    try:
        return evaluation_of(layout, run.directory)
    except MllmAssetsError:
        return None


def _metrics(found: EvaluatedRun | None) -> dict[str, dict[str, float]]:
    if found is None:
        return {}
    try:
        entries = read_metrics(found.metrics_dir)["entries"]
    except MllmAssetsError:
        return {}
    return {entry: scored["models"]["tuned"] for entry, scored in entries.items()}


def evaluated(layout: Layout, runs: Sequence[KnownRun]) -> list[KnownRun]:
    """Those of the runs that were evaluated, so that their answers can be shown."""
    return [run for run in runs if _evaluation(layout, run) is not None]


def pairs_of(layout: Layout, first: tuple[KnownRun, Model], second: tuple[KnownRun, Model]) -> list[Pair]:
    """The samples that both models were asked, in their order.

    Raises:
        IntegrityError: One was not evaluated, or they were asked nothing in common.
    """
    sides = []
    for run, model in (first, second):
        found = _evaluation(layout, run)
        if found is None:
            raise IntegrityError(f"{run.name} was not evaluated. {how_to_evaluate(layout, run.directory)}")
        samples = collect_samples(read_predictions(found.predictions_dir))
        data_dir = layout.root / str(run.recipe.get("dataset_dir", "data"))
        sides.append(({_identity(s): s["models"][model] for s in samples if model in s["models"]}, data_dir))
    (ones, data_dir), (others, _) = sides
    pairs = [_pair(ones[key], others[key], data_dir) for key in ones if key in others]
    if not pairs:
        raise IntegrityError(
            f"{first[0].name} and {second[0].name} were asked nothing in common. Evaluate both on the same entries."
        )
    return pairs


def _identity(sample: Mapping[str, Any]) -> tuple[str, str, str]:
    return sample["entry"], sample["sample_id"], sample["prompt"]


def _pair(one: Mapping[str, Any], other: Mapping[str, Any], data_dir: Path) -> Pair:
    return Pair(
        sample_id=one["sample_id"],
        entry=one["entry"],
        images=[path_inside(data_dir, path, what=f"Sample {one['sample_id']}") for path in one["images"]],
        prompt=one["prompt"],
        reference=one["reference"],
        answers=(one["answer"], other["answer"]),
        rights=(one["right"], other["right"]),
        losses_nats=(one["loss_nats"], other["loss_nats"]),
    )


def ordered(pairs: Sequence[Pair], order: str) -> list[Pair]:
    """Pairs in one of `ORDERS`."""

    def gain(pair: Pair) -> float:
        return pair.losses_nats[0] - pair.losses_nats[1]

    keys = {
        "most different losses": lambda pair: -abs(gain(pair)),
        "second better first": lambda pair: -gain(pair),
        "first better first": gain,
        "hardest first": lambda pair: -max(pair.losses_nats),
    }
    return sorted(pairs, key=keys[order]) if order in keys else list(pairs)
