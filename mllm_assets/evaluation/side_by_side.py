"""Any runs next to each other: their figures in one table, and what any two models answer to the same samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mllm_assets.artifacts import is_complete, path_inside, read_manifest
from mllm_assets.errors import IntegrityError, MllmAssetsError
from mllm_assets.evaluation.gallery import rights_of
from mllm_assets.evaluation.metrics import read_metrics
from mllm_assets.evaluation.run_lookup import EvaluatedRun, evaluation_of, how_to_evaluate
from mllm_assets.evaluation.scores import METRICS, in_order
from mllm_assets.evaluation.table import read_predictions
from mllm_assets.layout import Layout
from mllm_assets.training.runs.history import KnownRun, differing_keys, measured_answers, measured_losses

PAGE_SIZE = 12
ORDERS = ("as in the entry", "most different losses", "second better first", "first better first", "hardest first")
CHANGES = {
    "": "all",
    "differ": "the answers differ",
    "fixed": "only the second is right",
    "broken": "only the first is right",
    "wrong": "both are wrong",
}
IDENTITY = ["entry", "sample_id", "prompt"]  # of a question, whichever run asked it
RIGHT = "right"  # a column: 1, 0, or UNKNOWN
UNKNOWN = -1
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
    """What two models answered to one sample."""

    sample_id: str
    entry: str
    images: Sequence[Path]
    prompt: str
    reference: str
    answers: tuple[str, str]
    rights: tuple[bool | None, bool | None]
    losses_nats: tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """What two models answered to the samples that both were asked: in columns, objects for a page of them only.

    Attributes:
        sides: The rows of each model, those of a sample at the same place.
        folders: What the images' paths are relative to, and the recipe's `media_dir`, which may hold them.
    """

    sides: tuple[pa.Table, pa.Table]
    folders: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.sides[0])

    @property
    def num_right(self) -> tuple[int, int]:
        first, second = (int(np.sum(side[RIGHT].to_numpy() == 1)) for side in self.sides)
        return first, second

    def found(self, change: str, order: str) -> Sequence[int]:
        """The places of the pairs for which a key of `CHANGES` holds, in one of `ORDERS`."""
        first, second = self.sides
        rights = first[RIGHT].to_numpy(), second[RIGHT].to_numpy()
        answers = zip(first["answer"].to_pylist(), second["answer"].to_pylist(), strict=True)
        kept = {
            "": np.ones(len(self), bool),
            "differ": np.array([one.strip() != other.strip() for one, other in answers], bool),
            "fixed": (rights[0] == 0) & (rights[1] == 1),
            "broken": (rights[0] == 1) & (rights[1] == 0),
            "wrong": (rights[0] == 0) & (rights[1] == 0),
        }[change]
        losses = first["loss_nats"].to_numpy(), second["loss_nats"].to_numpy()
        gains = losses[0] - losses[1]
        keys = {
            "most different losses": -abs(gains),
            "second better first": -gains,
            "first better first": gains,
            "hardest first": -np.maximum(*losses),
        }
        places = np.flatnonzero(kept)
        return (places[np.argsort(keys[order][places], kind="stable")] if order in keys else places).tolist()

    def at(self, places: Sequence[int]) -> list[Pair]:
        """The pairs at some places."""
        ones, others = (side.take(pa.array(places, pa.int64())).to_pylist() for side in self.sides)
        return [_pair(one, other, self.folders) for one, other in zip(ones, others, strict=True)]


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
    for key in dict.fromkeys(["loss", *(key for log in logs for line in log for key in measured_losses(line))]):
        last = [next((line[key] for line in reversed(log) if line.get(key) is not None), None) for log in logs]
        lines.append(_line("training", f"last {key}", last, higher_is_better=False))
    for key in dict.fromkeys(key for log in logs for line in log for key in measured_answers(line)):
        last = [next((line[key] for line in reversed(log) if line.get(key) is not None), None) for log in logs]
        metric = METRICS.get(key.removeprefix("eval_"))
        lines.append(_line("training", f"last {key}", last, metric.higher_is_better if metric else None))
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


def pairs_of(layout: Layout, first: tuple[KnownRun, Model], second: tuple[KnownRun, Model]) -> Pairs:
    """The samples that both models were asked, in the order of the first.

    Raises:
        IntegrityError: One was not evaluated, or they were asked nothing in common.
    """
    sides = []
    for run, model in (first, second):
        found = _evaluation(layout, run)
        if found is None:
            raise IntegrityError(f"{run.name} was not evaluated. {how_to_evaluate(layout, run.directory)}")
        sides.append(_answers(found.predictions_dir, model))
    keys = [side.select(IDENTITY).append_column(f"at_{n}", pa.array(range(len(side)))) for n, side in enumerate(sides)]
    common = keys[0].join(keys[1], IDENTITY, join_type="inner").sort_by("at_0")
    if not len(common):
        raise IntegrityError(
            f"{first[0].name} and {second[0].name} were asked nothing in common. Evaluate both on the same entries."
        )
    one, other = (side.take(common[f"at_{n}"]) for n, side in enumerate(sides))
    recipe = first[0].recipe
    folders = (recipe.get("dataset_dir", "data"), recipe.get("media_dir"))
    return Pairs(sides=(one, other), folders=tuple(layout.root / str(folder) for folder in folders if folder))


def _answers(predictions_dir: Path, model: Model) -> pa.Table:
    """What a model answered, a row a sample, with whether it was right."""
    columns = [*IDENTITY, "images", "reference", "label", "answer", "loss_nats"]
    table = read_predictions(predictions_dir, columns=columns, model=model)
    rights = [UNKNOWN if right is None else int(right) for right in rights_of(table)]
    return table.append_column(RIGHT, pa.array(rights, pa.int8()))


def _pair(one: Mapping[str, Any], other: Mapping[str, Any], folders: Sequence[Path]) -> Pair:
    """The two answers; pictures' paths are relative to the first of `folders`, and may be in the others."""
    return Pair(
        sample_id=one["sample_id"],
        entry=one["entry"],
        images=[_picture(path, folders, f"Sample {one['sample_id']}") for path in one["images"]],
        prompt=one["prompt"],
        reference=one["reference"],
        answers=(one["answer"], other["answer"]),
        rights=(_truth(one[RIGHT]), _truth(other[RIGHT])),
        losses_nats=(one["loss_nats"], other["loss_nats"]),
    )


def _truth(right: int) -> bool | None:
    return None if right == UNKNOWN else bool(right)


def _picture(name: str, folders: Sequence[Path], what: str) -> Path:
    path = (folders[0] / name).resolve()
    if any(path.is_relative_to(folder.resolve()) for folder in folders[1:]):
        return path
    return path_inside(folders[0], name, what=what)
